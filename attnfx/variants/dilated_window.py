"""A window with gaps: the nearest keys at multiples of a dilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, positions
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class DilatedWindow(Variant):
    """Each query keeps its `window` nearest keys among those a multiple of `dilation` away, its own included.

    Key j is kept iff (p(i) - j) mod dilation = 0 and |p(i) - j| < window * dilation, where p(i) is the key at which query i stands;
    in a causal model these are `window` keys, otherwise 2 window - 1. At the ends of the sequence there are fewer. Tiles
    beyond the window are never visited; inside of it the gaps are computed and masked, since no tile lies in a gap.
    """

    window: int
    dilation: int = 2

    paper: ClassVar[str] = "Beltagy et al. 2020, Longformer: the Long-Document Transformer, dilated windows (arXiv:2004.05150)"
    exactness: ClassVar[str] = "approximate, needs training or fine-tuning"

    def __post_init__(self) -> None:
        whole_number(self, "window", least=1)
        whole_number(self, "dilation", least=1)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(4)), Example(cls(3, dilation=5)), Example(cls(5, dilation=3), queries=17), Example(cls(4), causal=False),
            Example(cls(4, dilation=4), queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return positions.objections(site, "a window")

    def apply(self, site: AttentionSite) -> AttentionSite:
        distance = positions.position(site) - expr.index("j")
        aligned = expr.eq(expr.mod(distance, expr.integer(self.dilation)), expr.integer(0))
        return site.replace(keep=expr.logical_and(site.keep, positions.window(site, self.window * self.dilation), aligned))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(site.queries * (self.window if positions.ordered(site) else 2 * self.window - 1), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        position, j = dense.places(M, N, q.device)
        kept = ((position - j) % self.dilation == 0) & ((position - j).abs() // self.dilation < self.window)
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))
