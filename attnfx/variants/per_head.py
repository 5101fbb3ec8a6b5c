"""A variant for each head of one attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Self

import sympy
import torch
from torch import Tensor

from attnfx import expr, variants
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend, Within
from attnfx.variants.base import Example, Variant, pairs

_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_MOST_HEADS = 10_000
_OF_ALL_HEADS = ("PerHead", "LowRankBias", "NeuralBias")  # the last two are computed from what a graph holds
_H = expr.INDEX["h"]


@dataclass(frozen=True)
class PerHead(Variant):
    """Heads by number, "0-3,8" for instance, each with the variant that serves them; the others stay exact.

    In a policy file `choices` is a table: `{ "0-3" = { name = "SlidingWindow", window = 1024 }, "8" = "keep" }`. Query heads are
    counted; those that share a key head are served alike. Runs of heads of one variant are one call each.
    """

    choices: tuple[tuple[str, Variant | None], ...]

    paper: ClassVar[str] = "heads differ: DuoAttention (arXiv:2410.10819), MoA (arXiv:2406.14909)"
    exactness: ClassVar[str] = "that of the variants it holds"

    def __post_init__(self) -> None:
        given: Any = self.choices
        if isinstance(given, Mapping):
            given = tuple(given.items())
        pairs = isinstance(given, tuple) and all(isinstance(c, tuple) and len(c) == 2 for c in given)
        if not pairs or not given or not all(isinstance(heads, str) for heads, _ in given):
            raise PolicyError(f'PerHead.choices is {given!r}; it must name a variant, or "keep", for heads such as "0-3,8".')
        read = tuple((heads, None if variant == "keep" else variant) for heads, variant in given)
        for _, variant in read:
            if variant is not None and (not isinstance(variant, Variant) or type(variant).__name__ in _OF_ALL_HEADS):
                others = ", ".join(_OF_ALL_HEADS)
                raise PolicyError(f'PerHead.choices holds {variant!r}; each choice is a variant other than {others}, or "keep".')
        object.__setattr__(self, "choices", read)
        self._by_head()

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        window, wide = variants.SlidingWindow(5), variants.SlidingWindow(17, sinks=2)
        mix = variants.IdentityMix(0.25)
        return (
            Example(cls((("0-1", window), ("2-3", wide)))), Example(cls((("2,3", window), ("0-1", None)))),
            Example(cls((("1-2", mix), ("3", window))), causal=False, key_heads=4),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if not site.heads.is_Integer or not site.key_heads.is_Integer:
            return (f"The numbers of heads are {site.heads} and {site.key_heads}; PerHead needs numbers that are known.",)
        if site.band is not None:
            return ("The scores hold a second product, with a vector of each distance, which PerHead does not take apart.",)
        most = max(self._by_head())
        if most >= site.heads:
            return (f"The choices name head {most}; the site has {site.heads} heads.",)
        group = int(site.heads) // int(site.key_heads)
        for run, _ in self._runs(int(site.heads)):
            if run.start % group or run.stop % group:
                return (f"Heads {run.start} to {run.stop - 1} are served apart, and {group} heads share a key head each.",)
        parts = [(variant, of_heads(site, run)) for run, variant in self._runs(int(site.heads)) if variant is not None]
        return tuple(dict.fromkeys(text for variant, part in parts for text in variant.objections(part)))

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        group, outputs = int(site.heads) // int(site.key_heads), []
        for run, variant in self._runs(int(site.heads)):
            heads, shared = slice(run.start, run.stop), slice(run.start // group, run.stop // group)
            part = of_heads(site, run)
            operands = query[:, heads], key[:, shared], value[:, shared]
            whole = attend(part, *operands) if variant is None else variant.compose(Within(attend, part), *operands)
            outputs.append(whole)
        return torch.cat(outputs, 1)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        """The mean over heads."""
        found = [
            len(run) * (variant.pairs if variant is not None else pairs)(of_heads(site, run))
            for run, variant in self._runs(int(site.heads))
        ]
        return sympy.Add(*found) / site.heads

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        k, v, outputs = dense.grouped(k, q), dense.grouped(v, q), []
        for run, variant in self._runs(q.shape[1]):
            heads = slice(run.start, run.stop)
            kept = keep if keep is None or keep.dim() < 4 or keep.shape[1] == 1 else keep[:, heads]
            if variant is not None:
                outputs.append(variant.reference(q[:, heads], k[:, heads], v[:, heads], scale, causal=causal, keep=kept))
                continue
            seen = dense.seen(q.shape[2], k.shape[2], causal, kept, q.device)
            outputs.append(dense.attention(q[:, heads], k[:, heads], v[:, heads], scale, seen))
        return torch.cat(outputs, 1)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "PerHead", "choices": {heads: v.to_dict() if v is not None else "keep" for heads, v in self.choices}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        choices = data.get("choices")
        if not isinstance(choices, Mapping) or set(data) - {"name", "choices"}:
            return super().from_dict(data)
        return cls(tuple((heads, _variant(heads, value)) for heads, value in choices.items()))

    def _by_head(self) -> dict[int, Variant | None]:
        found: dict[int, Variant | None] = {}
        for heads, variant in self.choices:
            for head in _numbers(heads):
                if head in found:
                    raise PolicyError(f"PerHead.choices names head {head} twice.")
                found[head] = variant
        return found

    def _runs(self, heads: int) -> Iterator[tuple[range, Variant | None]]:
        chosen = self._by_head()
        for variant, run in groupby(range(heads), lambda head: chosen.get(head)):
            numbers = list(run)
            yield range(numbers[0], numbers[-1] + 1), variant


def of_heads(site: AttentionSite, run: range) -> AttentionSite:
    """``site`` for the query heads of ``run`` alone, which count from 0; its side tensors stay those of all heads."""
    group = int(site.heads) // int(site.key_heads)
    names = [name for name in ("score", "keep", "sink", "literal", "weight") if getattr(site, name) is not None]
    moved = {name: expr.substitute(getattr(site, name), {_H: _H + run.start}) for name in names}
    sizes = {"heads": sympy.Integer(len(run)), "key_heads": sympy.Integer(len(run) // group)}
    return site.replace(**{"literal": None, **moved}, **sizes)


def _numbers(text: str) -> Sequence[int]:
    if not _RANGES.fullmatch(text):
        raise PolicyError(f'PerHead.choices has heads {text!r}; they must be numbers and ranges such as "0-3,8".')
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) >= _MOST_HEADS or int(last or first) < int(first):
            raise PolicyError(f"PerHead.choices has the range {part!r}; it must rise, and stay below {_MOST_HEADS}.")
        found += range(int(first), int(last or first) + 1)
    return found


def _variant(heads: str, value: Any) -> Variant | None:
    if value == "keep":
        return None
    data = {"name": value} if isinstance(value, str) else value
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise PolicyError(f'PerHead.choices has {value!r} for the heads {heads}; it must be "keep" or a table with a name.')
    return variants.named(data["name"]).from_dict(data)
