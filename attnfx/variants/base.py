"""What a variant is: its parameters, its paper, when it refuses, and what it computes."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from attnfx.errors import PolicyError, listing, nearest

if TYPE_CHECKING:
    import torch

    from attnfx.site import AttentionSite


class Variant(ABC):
    """Base of every variant; a subclass is a frozen dataclass whose fields are the paper's parameters.

    One module of `attnfx.variants` holds one variant. The walk in `attnfx.variants` registers it, and the policy file,
    the report, the command line and the tests that run over all variants pick it up from there.
    """

    paper: ClassVar[str]
    """Author, year, title and identifier of the source of the formula."""
    exactness: ClassVar[str]
    """What a user gives up, in a few words: "approximate, training-free"."""

    @abstractmethod
    def objections(self, site: "AttentionSite") -> tuple[str, ...]:
        """Why this variant cannot serve `site`: one sentence each, with the value found and the value supported."""

    @abstractmethod
    def apply(self, site: "AttentionSite") -> "AttentionSite":
        """`site` with the variant's meaning in place of its own. Called only where `objections` is empty."""

    @abstractmethod
    def reference(
        self,
        q: "torch.Tensor",
        k: "torch.Tensor",
        v: "torch.Tensor",
        scale: float,
        *,
        causal: bool = False,
        keep: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """The dense oracle, from the paper's formula, in the dtype of its inputs.

        `q` is (B, H, M, D), `k` is (B, G, N, D), `v` is (B, G, N, E) with H a multiple of G; the result is
        (B, H, M, E). `keep` broadcasts to (B, H, M, N) and is the mask the model had besides `causal`.
        """

    def to_dict(self) -> dict[str, Any]:
        """The variant as plain data: its class under "name", then its parameters."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        return {"name": type(self).__name__} | {field.name: getattr(self, field.name) for field in fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The variant whose `to_dict` gave `data`; PolicyError names an unknown, missing or invalid parameter."""
        given = {name: _frozen(value) for name, value in data.items() if name != "name"}
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in given:
            if name not in fields:
                raise PolicyError(f'{cls.__name__} has no parameter "{name}"; it has {listing(fields)}.{nearest(name, fields)}')
        for name, field in fields.items():
            optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if name not in given and not optional:
                raise PolicyError(f'{cls.__name__} needs the parameter "{name}", which is missing.')
        return cls(**given)


def whole_number(variant: Variant, name: str, least: int) -> None:
    """Refuse the parameter `name` of `variant` unless it is an int (no bool) of at least `least`."""
    value = getattr(variant, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolicyError(f"{type(variant).__name__}.{name} is {value!r}; it must be a whole number of at least {least}.")


def _frozen(value: Any) -> Any:
    """Lists, which TOML and JSON read, as the tuples that a hashable variant holds."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
