"""The first keys and the nearest ones: the A-shape of MInference."""

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
class AShape(Variant):
    """Causal attention to the first `n_init` keys and the nearest `n_local` ones, the query's own among them, key by key.

    Key j is kept iff the model keeps it and j < n_init or p(i) - j < n_local, where p(i) is the key at which query i stands.
    Keys keep the positions that the model gave them. In prefill and decoding alike; a kernel that rounds to blocks would keep a
    few more.
    """

    n_init: int = 100
    n_local: int = 800

    paper: ClassVar[str] = "Jiang et al. 2024, MInference 1.0 (arXiv:2407.02490)"
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        whole_number(self, "n_init", least=0)
        whole_number(self, "n_local", least=1)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(3, 7)), Example(cls(2, 5), queries=13), Example(cls(4, 6), queries=1)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if not site.facts.causal and site.queries != 1:
            return ("No causal mask is proved, and an A-shape needs one: SlidingWindow serves attention in both directions.",)
        return positions.objections(site, "an A-shape")

    def apply(self, site: AttentionSite) -> AttentionSite:
        return site.replace(keep=expr.logical_and(site.keep, positions.window(site, self.n_local, self.n_init)))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(site.queries * (self.n_init + self.n_local), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        position, j = dense.places(M, N, q.device)
        kept = (j < self.n_init) | ((position - j < self.n_local) & (j <= position))
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))
