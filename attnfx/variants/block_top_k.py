"""The best pages of the key-value cache for each query, or each few queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense, gathered, selection
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class BlockTopK(Variant):
    """Each block of `query_block` queries keeps the `top` pages of `page` keys that score best, the first `sinks` keys, the last
    `window` keys, and the pages it stands in.

    A page's score is the mean of q.k over its keys, with q the mean over the query heads that share a key head of the block's
    first query. In a decode step that is the paper's choice. In a prefill `query_block` queries share it, as nothing of their
    future may choose: only pages complete at the first query take part, and `query_block=1` chooses for every query. Whole
    pages are kept, also for `sinks` and `window`. Kernels on a GPU visit tiles of 64 queries, which have the pages of all
    choices in them: smaller blocks of queries save less there.

    In a decode step the pages that are kept are gathered, where they are at most half of the keys or their number is not known:
    pages scattered over all keys would leave out few of a kernel's tiles. The scores of pages are made anew in each step, in one
    pass over the keys, which is half of what dense attention reads.
    They could be kept only where a graph could tell that its cache is that of the step before, but for one key: a cache that
    grows is another tensor in each step, and one that is written in place may hold another prompt, or have been reordered by
    a beam search, at the same address.
    """

    top: int = 64
    page: int = 16
    sinks: int = 4
    window: int = 0
    query_block: int = 128

    paper: ClassVar[str] = "Sadhukhan et al. 2025, Kinetics: Rethinking Test-Time Scaling Laws (arXiv:2506.05333), block top-k"
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("page", 1), ("sinks", 0), ("window", 0), ("query_block", 1)):
            whole_number(self, name, least)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        small = cls(top=2, page=4, sinks=1, query_block=8)
        return (
            Example(small), Example(cls(1, 5, sinks=0, window=6, query_block=3), queries=13), Example(small, queries=1),
            Example(cls(3, 4, query_block=4), causal=False), Example(cls(2, 3, sinks=0, query_block=1)),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return selection.objections(site, growing=True)

    @property
    def _size(self) -> tuple[int, int]:
        return self.query_block, self.page

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        group = int(site.heads) // int(site.key_heads)
        first = torch.ops.aten.slice.Tensor(query, 2, 0, 2**63 - 1, self.query_block)
        shared = torch.mean(torch.unflatten(selection.wide(first, site.dtype), 1, (int(site.key_heads), group)), 2)
        if gathered.possible(site, self.page * gathered.count(self.top, self.page, self.sinks, self.window)):
            return gathered.attended(attend, query, key, value, shared, self.top, self.page, self.sinks, self.window)
        means = selection.pooled(attend, selection.wide(key, site.dtype), site.keys, self.page)
        scores = torch.repeat_interleave(torch.matmul(shared, torch.transpose(means, 2, 3)), group, 1)
        table = selection.chosen(attend, scores, self.top, self._size, self.sinks, self.window)
        return attend(selection.masked(site, self._size), query, key, value, [table])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        pages = self.top + -(-self.sinks // self.page) + -(-(self.window + self.query_block) // self.page) + 1
        return sympy.Min(site.queries * pages * self.page, super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        ordered, rows = causal or M == 1, []
        with torch.no_grad():
            for first in range(0, M, self.query_block):
                at = first + N - M if ordered else N
                one = torch.unflatten(q[:, :, first], 1, (-1, group)).mean(2).repeat_interleave(group, 1)
                dots = torch.einsum("bhd,bhjd->bhj", one.double(), dense.grouped(k, q).double())
                pages = [range(j, min(j + self.page, N)) for j in range(0, N, self.page)]
                score = torch.stack([dots[..., p.start : p.stop].mean(-1) for p in pages], -1)
                complete = [n for n, p in enumerate(pages) if p.start + self.page - 1 <= at or not ordered]
                kept = [p.start < self.sinks or (ordered and p.start + self.page - 1 > at - self.window) for p in pages]
                rows.append(selection.stated(score, complete, kept, self.top))
            table = selection.opened(torch.stack(rows, 2), self._size, M, N)
        return dense.attention(q, k, v, scale, table & dense.seen(M, N, causal, keep, q.device))
