"""Combiner: direct attention inside of segments, and one summary for each other segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, linear, summaries
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class Combiner(Variant):
    """A query sees the keys of its own segment of `segment` tokens, and one for each other segment, or each before if causal.

    A segment's key is the mean, or the maximum of each feature, of its keys; its value is the mean of its values weighed by the
    softmax of its mean (or maximal) query with its keys. All keys and summaries are in one softmax. This is the paper's
    Combiner-Fixed without its learned maps; the queries of heads that share a key head are averaged first. `segment` is best near
    the root of the length.
    """

    segment: int = 64
    pool: str = "mean"

    paper: ClassVar[str] = "Ren et al. 2021, Combiner: Full Attention Transformer with Sparse Computation Cost (arXiv:2107.05768)"
    exactness: ClassVar[str] = "approximate, needs training"

    def __post_init__(self) -> None:
        whole_number(self, "segment", least=1)
        if self.pool not in ("mean", "max"):
            raise PolicyError(f'Combiner.pool is {self.pool!r}; it must be "mean" or "max".')

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(6)), Example(cls(7, "max")), Example(cls(5), causal=False), Example(cls(64), causal=False)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return summaries.objections(site, "a Combiner")

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, n, size = attend.site, int(attend.site.keys), self.segment
        parts = summaries.segments(key, n, size)
        by = self._pooled(summaries.led(attend, query), n, site.dtype)
        kept = torch.arange(parts_of(n, size) * size).view(-1, size) < n
        _, values = summaries.gathered(by, parts, summaries.segments(value, n, size), site.scale or 1.0, kept)
        causal = linear.is_causal(site)
        width = expr.integer(size)

        def seen(i: Expr, m: Expr) -> Expr:
            return expr.lt(m, expr.floordiv(i, width)) if causal else expr.ne(m, expr.floordiv(i, width))

        def near(i: Expr, j: Expr) -> Expr:
            return expr.eq(expr.floordiv(i, width), expr.floordiv(j, width))

        pooled = self._pooled(key, n, site.dtype)
        return summaries.attended(attend, parts_of(n, size), query, (pooled, key), (values, value), seen, near)

    def _pooled(self, x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """(B, G, N, D) as (B, G, segments, D)."""
        if self.pool == "max":
            return torch.amax(summaries.segments(x, length, self.segment, float("-inf")), 3)
        rows = torch.full((parts_of(length, self.segment), 1), float(self.segment), dtype=dtype)
        rows[-1] = length - (rows.shape[0] - 1) * self.segment
        return torch.sum(summaries.segments(x, length, self.segment), 3) / rows

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return site.queries * (self.segment + site.keys / self.segment)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        N, size, group = k.shape[2], self.segment, q.shape[1] // k.shape[1]
        spans = [slice(a, min(a + size, N)) for a in range(0, N, size)]
        keys, values = [], []
        for s in spans:
            means = torch.unflatten(q[:, :, s], 1, (-1, group)).mean(2)
            pool, at = (means.mean(2), k[:, :, s].mean(2)) if self.pool == "mean" else (means.amax(2), k[:, :, s].amax(2))
            weights = (scale * torch.einsum("bgd,bgjd->bgj", pool, k[:, :, s])).softmax(-1)
            keys.append(at)
            values.append(torch.einsum("bgj,bgje->bge", weights, v[:, :, s]))
        place = torch.arange(N, device=q.device) // size
        other = torch.arange(len(spans), device=q.device)
        away = other < place[:, None] if causal else other != place[:, None]
        own = (place == place[:, None]) & dense.seen(N, N, causal, keep, q.device)
        z = [dense.scores(q, torch.stack(keys, 2), scale), dense.scores(q, k, scale)]
        return summaries.stated(z, [away, own], [dense.grouped(torch.stack(values, 2), q), dense.grouped(v, q)])


def parts_of(length: int, size: int) -> int:
    """How many segments there are."""
    return -(-length // size)
