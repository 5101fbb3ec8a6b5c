"""Blocks of keys found by descending a tree: HiP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, selection
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class HierarchicalTopK(Variant):
    """Each block of `block_size_q` queries keeps `mask_k` keys, in blocks of `block_size_k`, that a search down a binary tree of
    the keys finds; and the first `sinks` keys, the last `sliding_window` ones, and the blocks it stands in.

    The search begins with as many equal stretches of the keys as it keeps blocks. Each step halves the stretches, scores each half
    by the product of the mean query with the key in the half's middle, and goes on with the best, so that the number of scores
    grows with the logarithm of the keys. Stretches lie at the same places for all queries. As nothing of the future may choose,
    the mean under a causal mask is of the `block_size_q` queries up to and with the block's first, and only blocks of keys
    complete at the first are found. The paper's blocks are of 32 queries and 2 keys, and its `mask_k` is 512; a kernel leaves out
    whole tiles, so that blocks are larger here. The table has (queries / `block_size_q`) x (keys / `block_size_k`) bytes for
    each head.
    """

    mask_k: int = 2048
    block_size_q: int = 128
    block_size_k: int = 64
    sinks: int = 64
    sliding_window: int = 128

    paper: ClassVar[str] = (
        "Lee et al. 2024, A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned "
        "Attention (arXiv:2406.09827), HiP"
    )
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        for name, least in (("mask_k", 1), ("block_size_q", 1), ("block_size_k", 1), ("sinks", 0), ("sliding_window", 0)):
            whole_number(self, name, least)
        if self.mask_k < self.block_size_k:
            raise PolicyError(f"HierarchicalTopK.mask_k is {self.mask_k}; it must be at least a block, {self.block_size_k}.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        small = cls(8, 4, 2, sinks=1, sliding_window=3)
        return (
            Example(small), Example(cls(3, 3, 1, 0, 0), queries=13), Example(small, queries=1),
            Example(cls(6, 5, 3, 2, 0), causal=False, queries=29), Example(cls(4, 1, 3, 0, 2), queries=20, keys=33, key_heads=4),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return selection.objections(site)

    @property
    def _size(self) -> tuple[int, int]:
        return self.block_size_q, self.block_size_k

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        complete, always = selection.standing(attend, self._size, self.sinks, self.sliding_window)
        means = selection.of_queries(attend, query, self.block_size_q)
        found = self._found(attend, means, torch.detach(key), torch.sum(complete, -1, keepdim=True))
        return attend(selection.masked(site, self._size), query, key, value, [torch.logical_or(found, always)])

    def _found(self, attend: Attend, means: Tensor, key: Tensor, complete: Tensor) -> Tensor:
        """Which blocks (B, H, I, J) the search finds, of the first ``complete`` (I or 1, 1) ones, for mean queries (B, H, I, D)."""
        number = selection.blocks(attend.site.keys, self.block_size_k)
        kept, length = _stretches(self.mask_k // self.block_size_k, number)
        starts = torch.mul(attend.arange(kept), length) + torch.zeros_like(means[..., :1], dtype=torch.int64)
        while length > 1:
            length //= 2
            starts = torch.cat([starts, torch.add(starts, length)], -1)
            scores = self._scores(attend, means, key, starts, length, complete)
            scores = torch.masked_fill(scores, torch.ge(starts, complete), float("-inf"))
            starts = torch.gather(starts, 3, torch.ops.aten.topk.default(scores, kept)[1])
        nowhere = torch.full_like(starts, number)
        table = torch.cat([torch.zeros_like(means[..., :1], dtype=torch.bool)] * (number + 1), -1)
        return torch.scatter(table, 3, torch.where(torch.lt(starts, complete), starts, nowhere), True)[..., :number]

    def _scores(self, attend: Attend, means: Tensor, key: Tensor, starts: Tensor, length: int, complete: Tensor) -> Tensor:
        """Products of mean queries with the keys in the middle of stretches of ``length`` blocks from ``starts`` (B, H, I, S)."""
        site, size = attend.site, self.block_size_k
        last = torch.clamp(torch.mul(complete, size), max=int(site.keys)) - 1
        middle = torch.clamp(torch.minimum(torch.add(torch.mul(starts, size), length * size // 2), last), min=0)
        heads, group = int(site.key_heads), int(site.heads) // int(site.key_heads)
        at = torch.unflatten(middle, 1, (heads, group))
        keys = torch.gather(key, 2, torch.unsqueeze(torch.flatten(at, 2, 4), -1).expand(-1, -1, -1, site.head_dim))
        count = selection.blocks(site.queries, self.block_size_q)
        keys = torch.unflatten(selection.wide(keys, site.dtype), 2, (group, count, -1))
        by = torch.unsqueeze(torch.unflatten(means, 1, (heads, group)), 4)
        return torch.flatten(torch.sum(keys * by, -1), 1, 2)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        each = self.mask_k + self.sinks + self.sliding_window + self.block_size_q + 2 * self.block_size_k
        return sympy.Min(site.queries * each, super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, (rows, size) = q.shape[2], k.shape[2], self._size
        ordered, keys, blocks = causal or M == 1, dense.grouped(k, q).detach().double(), range(-(-N // size))
        most, table = self.mask_k // size, torch.zeros(*q.shape[:2], -(-M // rows), len(blocks), dtype=torch.bool)
        for b, h, I in torch.cartesian_prod(*map(torch.arange, table.shape[:3])).tolist():
            first = I * rows
            at = first + N - M if ordered else N
            run = q[b, h, max(0, first - rows + 1) : first + 1] if ordered else q[b, h, first : first + rows]
            mean = run.detach().double().mean(0)
            complete = [n for n in blocks if n * size + size - 1 <= at or not ordered]
            length = 1
            while length * most < len(blocks):
                length *= 2
            stretches = [complete[n : n + length] for n in range(0, len(complete), length)]
            while length > 1:
                length //= 2
                halves = [half for s in stretches for half in (s[:length], s[length:]) if half]
                halves.sort(
                    key=lambda s: (
                        -float(mean @ keys[b, h, min(s[0] * size + length * size // 2, min(N, (complete[-1] + 1) * size) - 1)])
                    )
                )
                stretches = halves[:most]
            for n in blocks:
                near = ordered and n * size + size - 1 > at - self.sliding_window
                table[b, h, I, n] = [n] in stretches or n * size < self.sinks or near
        return dense.attention(q, k, v, scale, selection.opened(table, self._size, M, N) & dense.seen(M, N, causal, keep, q.device))


def _stretches(most: int, blocks: int) -> tuple[int, int]:
    """How many stretches the search keeps, and how many blocks each has at first: a power of two, so that they cover all."""
    length = 1
    while length * most < blocks:
        length *= 2
    return (most if length > 1 else blocks), length
