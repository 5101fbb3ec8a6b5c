"""Radial attention of a video: the further two frames are apart in time, the nearer two of their tokens have to be in space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import boxes, dense
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class Radial(Variant):
    """`frames` frames of `tokens_per_frame` tokens, and `text` tokens behind them, which see all and are seen by all.

    Of the tokens at x and y in frames that are t apart, with g the number of bits of t and D = 2^bits(tokens_per_frame) / 2^g:
    a pair belongs to the pattern if |x - y| is at most max(decay_factor D, block_size), or in any place if t <= 1; and, where D is
    less than the block size, only if t is a multiple of floor(block_size / D). With `sink` all see the first frame. Blocks of the
    whole sequence, of block_size queries and as many keys, are seen entirely or not: a block is, if for some pair of frames more
    than 60 % of those columns of it that have pairs have pairs in more than a third of block_size rows. The diagonal blocks are
    always seen.
    """

    frames: int
    tokens_per_frame: int
    text: int = 0
    decay_factor: float = 1.0
    sink: bool = True
    block_size: int = 128

    paper: ClassVar[str] = "Li et al. 2025, Radial Attention: O(n log n) Sparse Attention for Video Generation (arXiv:2506.19852)"
    exactness: ClassVar[str] = "approximate, training-free at the length that a model was trained for"

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("tokens_per_frame", 1), ("text", 0), ("block_size", 1)):
            whole_number(self, name, least)
        factor: object = self.decay_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise PolicyError(f"Radial.decay_factor is {factor!r}; it must be a number from 0 on.")
        if not isinstance(self.sink, bool):
            raise PolicyError(f"Radial.sink is {self.sink!r}; it must be true or false.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(7, 12, decay_factor=0.5, block_size=4), 84, 84, causal=False),
            Example(cls(9, 7, text=5, decay_factor=0.3, block_size=4), 68, 68, causal=False),
            Example(cls(8, 6, decay_factor=0.2, sink=False, block_size=4), 48, 48),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return boxes.objections(site, (self.frames, self.tokens_per_frame), self.text)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = _blocks(self)
        site, slot = beside(attend.site, blocks.shape, torch.bool)
        size = expr.integer(self.block_size)
        place = (expr.floordiv(expr.index(name), size) for name in "ij")
        seen: Expr = read(slot, *place, dtype=torch.bool)
        if self.text:
            video = expr.integer(self.frames * self.tokens_per_frame)
            seen = expr.logical_or(seen, *(expr.le(video, expr.index(name)) for name in "ij"))
        if site.keep == expr.TRUE or site.facts.causal_offset == 0:  # a token sees itself, so no row is empty
            site = site.replace(fill=-math.inf, additive=False, empty_rows="zero")
        site = site.replace(keep=expr.logical_and(site.keep, seen))
        return attend(site, query, key, value, [attend.constant(blocks)])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        video = self.frames * self.tokens_per_frame
        kept = _blocks(self).repeat_interleave(self.block_size, 0).sum(0).repeat_interleave(self.block_size)[:video]
        return sympy.Min(sympy.Integer(int(kept.sum()) + 2 * video * self.text + self.text**2), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        """Block by block, from the pairs of each pair of frames alone."""
        n, size = self.tokens_per_frame, self.block_size
        video = self.frames * n
        kept = torch.zeros(video, video, dtype=torch.bool)
        for first in range(0, video, size):
            for start in range(0, video, size):
                rows, columns = range(first, min(first + size, video)), range(start, min(start + size, video))
                if first == start or self._dense(rows, columns):
                    kept[rows.start : rows.stop, columns.start : columns.stop] = True
        kept = boxes.with_extra(kept, self.text, False).to(q.device)
        return dense.attention(q, k, v, scale, kept & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))

    def _dense(self, rows: range, columns: range) -> bool:
        """Whether some pair of frames fills the block well enough."""
        n = self.tokens_per_frame
        counts: dict[tuple[int, int], dict[int, int]] = {}
        for i in rows:
            for j in columns:
                if self._pair(i // n, i % n, j // n, j % n):
                    of_frames = counts.setdefault((i // n, j // n), {})
                    of_frames[j] = of_frames.get(j, 0) + 1
        return any(5 * sum(3 * c > self.block_size for c in found.values()) > 3 * len(found) for found in counts.values())

    def _pair(self, a: int, x: int, b: int, y: int) -> bool:
        t = abs(a - b)
        reach = 2.0 ** (self.tokens_per_frame.bit_length() - t.bit_length())
        if self.sink and b == 0:
            return True
        if reach < self.block_size and t % int(self.block_size / reach):
            return False
        return t <= 1 or abs(x - y) <= max(self.decay_factor * reach, self.block_size)


@lru_cache(maxsize=16)
def _blocks(variant: Radial) -> Tensor:
    """Which blocks are seen, bool, of all tokens."""
    n, size, frames = variant.tokens_per_frame, variant.block_size, variant.frames
    count = -(-(frames * n + variant.text) // size)
    seen = torch.eye(count, dtype=torch.bool)
    for a in range(frames):
        for b in range(frames):
            t = abs(a - b)
            reach = 2.0 ** (n.bit_length() - t.bit_length())
            all_see = variant.sink and b == 0
            width = n if t <= 1 or all_see else int(max(variant.decay_factor * reach, size))
            if reach >= size or t % int(size / reach) == 0 or all_see:
                found = _filled(n, a * n, b * n, width, size)
                seen[a * n // size :, b * n // size :][: len(found), : found.shape[1]] |= found
    return seen


def _filled(n: int, row: int, column: int, width: int, size: int) -> Tensor:
    """The blocks that two frames of ``n`` tokens, of which the first are at (row, column) of the sequence, fill well enough with
    the pairs that are no further apart than ``width``: from the first block that holds any of them."""
    first = torch.arange(-(row % size), n, size)[:, None]
    y = torch.arange(-(column % size), n + -(column + n) % size)  # whole blocks of columns
    begin, end = (y - width).clamp(min=first.clamp(min=0)), (y + width + 1).clamp(max=(first + size).clamp(max=n))
    in_column = (end - begin).clamp(min=0) * ((y >= 0) & (y < n))
    high, some = ((c.view(len(first), -1, size)).sum(-1) for c in (3 * in_column > size, in_column > 0))
    return 5 * high > 3 * some
