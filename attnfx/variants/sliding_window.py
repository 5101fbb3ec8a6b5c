"""Sliding-window attention, with or without attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, positions
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class SlidingWindow(Variant):
    """Each query keeps its `window` nearest keys and the first `sinks` keys, of those the model lets it see.

    Query i stands at key p(i): the last key that a causal mask lets it see, or i + N - M where there is no such mask
    (the last query at the last key). Key j is kept iff the model keeps it and |p(i) - j| < window or j < sinks; in a
    causal model that is 0 <= p(i) - j < window or j < sinks. `window` counts the query's own key, as in Mistral:
    window=1 leaves it alone.
    """

    window: int
    sinks: int = 0

    paper: ClassVar[str] = (
        "Beltagy et al. 2020, Longformer (arXiv:2004.05150), windows as in Mistral 7B (arXiv:2310.06825); "
        "sinks: Xiao et al. 2024, StreamingLLM (arXiv:2309.17453)"
    )
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        whole_number(self, "window", least=1)
        whole_number(self, "sinks", least=0)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(8)), Example(cls(8, sinks=2)), Example(cls(5, sinks=1), queries=13), Example(cls(6, sinks=2), causal=False),
            Example(cls(7, sinks=3), queries=1, key_heads=4),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return positions.objections(site, "a window")

    def apply(self, site: AttentionSite) -> AttentionSite:
        return site.replace(keep=expr.logical_and(site.keep, positions.window(site, self.window, self.sinks)))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        width = self.window if positions.ordered(site) else 2 * self.window - 1
        return sympy.Min(site.queries * (width + self.sinks), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        position = torch.arange(M, device=q.device)[:, None] + (N - M)
        j = torch.arange(N, device=q.device)
        kept = ((position - j).abs() < self.window) | (j < self.sinks)
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))
