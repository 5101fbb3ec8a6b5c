"""What a variant is: its parameters, its paper, when it refuses, and what it computes."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import sympy

from attnfx.errors import PolicyError, listing, nearest

if TYPE_CHECKING:
    import torch

    from attnfx.site import AttentionSite
    from attnfx.variants.attend import Attend


@dataclasses.dataclass(frozen=True)
class Example:
    """An instance of a variant with an attention that it serves: for the tests, the pictures and the docs.

    ``tolerance`` is the largest difference from the oracle in float64; ``learns``: gradients flow as the oracle's do; ``plain``: a
    model without a bias, or anything else beside it, is changed; ``foresees``: under a causal mask, too, what comes after a query
    takes part in the choice of what it sees.
    """

    variant: "Variant"
    queries: int = 37
    keys: int = 37
    causal: bool = True
    key_heads: int = 2
    tolerance: float = 1e-9
    learns: bool = True
    plain: bool = True
    foresees: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes that are read and written at least, of one call, in the site's sizes."""

    flops: sympy.Expr
    bytes: sympy.Expr


class Variant(ABC):
    """Base of every variant; a subclass is a frozen dataclass whose fields are the paper's parameters.

    One module of `attnfx.variants` holds one variant. The walk in `attnfx.variants` registers it, and the policy file,
    the report, the command line and the tests that run over all variants pick it up from there. A variant that changes which keys
    are kept, or the scores, says so in `apply`; one that is made of several operations overrides `compose`.
    """

    paper: ClassVar[str]
    """Author, year, title and identifier of the source of the formula."""
    exactness: ClassVar[str]
    """What a user gives up, in a few words: "approximate, training-free"."""

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Example, ...]:
        """Instances with attentions that they serve: every test over all variants runs each of them with four query heads,
        `head_dim` 16 and `value_dim` 8."""

    @abstractmethod
    def objections(self, site: "AttentionSite") -> tuple[str, ...]:
        """Why this variant cannot serve `site`: one sentence each, with the value found and the value supported."""

    def apply(self, site: "AttentionSite") -> "AttentionSite":
        """`site` with the variant's meaning in place of its own. Called only where `objections` is empty."""
        return site

    def compose(self, attend: "Attend", query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "torch.Tensor":
        """The output (B, H, M, E), made of torch operations and of attentions by `attend`. Called only where `objections` is empty.

        The operands may be proxies of a graph: see :mod:`attnfx.variants.attend`.
        """
        return attend(self.apply(attend.site), query, key, value)

    @classmethod
    def is_composed(cls) -> bool:
        """Whether it is made of several operations, so that `apply` does not say what it computes."""
        return cls.compose is not Variant.compose

    def pairs(self, site: "AttentionSite") -> sympy.Expr:
        """How many pairs of a query and a key one head computes, in the site's sizes: if not overridden, all of :func:`pairs`."""
        return pairs(site)

    def cost(self, site: "AttentionSite") -> Cost:
        """What a forward pass costs."""
        heads, size = site.batch * site.heads, site.dtype.itemsize
        flops = flops_of(site, self.pairs(site))
        rows = heads * site.queries * (site.head_dim + site.value_dim)
        columns = site.batch * site.key_heads * site.keys * (site.head_dim + site.value_dim)
        return Cost(flops, sympy.expand(size * (rows + columns)))

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


def pairs(site: "AttentionSite") -> sympy.Expr:
    """How many pairs of a query and a key one head of `site` has: all that a causal mask leaves."""
    M, N = site.queries, site.keys
    return M * N - M * (M - 1) / 2 if site.facts.causal else M * N


def flops_of(site: "AttentionSite", pairs: sympy.Expr) -> sympy.Expr:
    """Floating-point operations of both products, of so many pairs of a query and a key for each head."""
    return sympy.expand(2 * site.batch * site.heads * pairs * (site.head_dim + site.value_dim))


def whole_number(variant: Variant, name: str, least: int) -> None:
    """Refuse the parameter `name` of `variant` unless it is an int (no bool) of at least `least`."""
    value = getattr(variant, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolicyError(f"{type(variant).__name__}.{name} is {value!r}; it must be a whole number of at least {least}.")


def _frozen(value: Any) -> Any:
    """Lists, which TOML and JSON read, as the tuples that a hashable variant holds."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
