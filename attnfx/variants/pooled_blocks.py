"""Blocks of keys chosen by pooled queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense, selection
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class PooledBlocks(Variant):
    """Each block of `block` queries keeps the `top` blocks of `block` keys whose mean key has the largest product with its mean
    query.

    The mean of a whole block of queries knows those that come later in it, and lets them choose for the earlier ones, which the
    paper accepts in a prefill. Here, under a causal mask, the mean is of the `block` queries up to and with the block's first,
    only blocks of keys complete at the first query are chosen, and the block's own keys are kept besides. Without a causal mask
    it is the paper's.
    """

    top: int = 100
    block: int = 64

    paper: ClassVar[str] = "Jiang et al. 2024, MInference 1.0 (arXiv:2407.02490), block-sparse heads"
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        whole_number(self, "top", least=1)
        whole_number(self, "block", least=1)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(2, 4)),
            Example(cls(1, 5), queries=13),
            Example(cls(2, 3), queries=1),
            Example(cls(3, 4), causal=False, queries=29),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return selection.objections(site, growing=True)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, size = attend.site, (self.block, self.block)
        means = selection.pooled(attend, selection.wide(key, site.dtype), site.keys, self.block)
        means = torch.repeat_interleave(means, int(site.heads) // int(site.key_heads), 1)
        scores = torch.matmul(selection.of_queries(attend, query, self.block), torch.transpose(means, 2, 3))
        table = selection.chosen(attend, scores, self.top, size)
        return attend(selection.masked(site, size), query, key, value, [table])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        blocks = self.top + (2 if selection.ordered(site) else 0)
        return sympy.Min(site.queries * blocks * self.block, super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, size = q.shape[2], k.shape[2], self.block
        starts, ordered = range(0, N, size), causal or M == 1
        with torch.no_grad():
            keys = torch.stack([dense.grouped(k, q)[:, :, j : j + size].double().mean(2) for j in starts], 2)
            rows = []
            for first in range(0, M, size):
                run = slice(max(0, first - size + 1), first + 1) if ordered else slice(first, first + size)
                score = torch.einsum("bhd,bhjd->bhj", q[:, :, run].double().mean(2), keys)
                at = first + N - M
                complete = [n for n, j in enumerate(starts) if not ordered or j + size - 1 <= at]
                own = [ordered and j + size - 1 > at for j in starts]
                rows.append(selection.stated(score, complete, own, self.top))
            table = selection.opened(torch.stack(rows, 2), (size, size), M, N)
        return dense.attention(q, k, v, scale, table & dense.seen(M, N, causal, keep, q.device))
