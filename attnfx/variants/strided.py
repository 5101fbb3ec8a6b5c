"""The strided pattern of the sparse transformer: the last keys, and every key a multiple of the stride away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, head_tables, positions
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class Strided(Variant):
    """Key j is kept where it is within `stride` of the query's own place p(i), or a multiple of `stride` away from it.

    The paper's two factors are |p(i) - j| <= stride and (p(i) - j) mod stride = 0. With `heads="merged"` each head has both;
    with "split" the first half of the query heads (rounded down) has the local one, the others the strided one. Keys at a
    multiple of the stride lie in every tile of a kernel that is as long as the stride, so the strided factor saves time only
    where the stride is several tiles long, whereas the local one always does.
    """

    stride: int = 128
    heads: str = "merged"

    paper: ClassVar[str] = "Child et al. 2019, Generating Long Sequences with Sparse Transformers (arXiv:1904.10509)"
    exactness: ClassVar[str] = "approximate, needs training or fine-tuning"

    def __post_init__(self) -> None:
        whole_number(self, "stride", least=1)
        given: Any = self.heads
        if given not in ("merged", "split"):
            raise PolicyError(f'Strided.heads is {given!r}; it must be "merged" or "split".')

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(6)), Example(cls(5, heads="split")), Example(cls(7), queries=15),
            Example(cls(4, heads="split"), causal=False), Example(cls(9), queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if self.heads == "split" and not site.heads.is_Integer:
            return (f"The number of heads is {site.heads}; they are split where it is known.",)
        return positions.objections(site, "a stride")

    def apply(self, site: AttentionSite) -> AttentionSite:
        local = positions.window(site, self.stride + 1)
        distance = positions.position(site) - expr.index("j")
        strided = expr.eq(expr.mod(distance, expr.integer(self.stride)), expr.integer(0))
        if self.heads == "merged":
            return site.replace(keep=expr.logical_and(site.keep, expr.logical_or(local, strided)))
        first = head_tables.of_heads(range(int(site.heads) // 2))
        parts = expr.logical_or(expr.logical_not(first), local), expr.logical_or(first, strided)
        return site.replace(keep=expr.logical_and(site.keep, *parts))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        everything = super().pairs(site)
        local = site.queries * (self.stride + 1) * (1 if positions.ordered(site) else 2)
        both = local + everything / self.stride
        return sympy.Min(both if self.heads == "merged" else both / 2, everything)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        H, M, N = q.shape[1], q.shape[2], k.shape[2]
        position, j = dense.places(M, N, q.device)
        local = (position - j).abs() <= self.stride
        strided = (position - j) % self.stride == 0
        kept = local | strided
        if self.heads == "split":
            kept = local.expand(H, M, N).clone()
            kept[H // 2 :] = strided
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))
