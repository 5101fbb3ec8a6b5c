"""Blocks of the score matrix: which there are, and the logits of one. Shared by forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.evaluate import evaluate, integer
from attnfx.expr import INDEX, Expr, Int, Load
from attnfx.intervals import enclose
from attnfx.lowering import blocks as lists
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable.philox import dropout_scale
from attnfx.lowering.ranges import FIRST, LAST, Candidates
from attnfx.tiling import Tiling, kinds

#: Scores in one block: 4 MB of float32.
ELEMENTS = 1 << 20
#: Rows of a block, where that many fit.
ROWS = 128
#: Rows and keys of the tiles that a mask without closed-form bounds is judged by.
TILE = (64, 128)


@dataclass(frozen=True)
class Block:
    """Rows of queries against a range of keys, for some batches and query heads. ``full``: every one of these keys is kept."""

    batches: range
    heads: range
    rows: range
    keys: range
    full: bool

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """Where its rows are in a (B,H,M,...) tensor."""
        return (
            slice(self.batches.start, self.batches.stop),
            slice(self.heads.start, self.heads.stop),
            slice(self.rows.start, self.rows.stop),
        )


@dataclass(frozen=True)
class Problem:
    """One call: the plan, its tensors and the numbers that its formulas need."""

    plan: KernelPlan
    q: Tensor
    k: Tensor
    v: Tensor
    loads: Sequence[Tensor]
    sizes: tuple[int, ...]
    seed: Tensor | None

    @cached_property
    def values(self) -> dict[sympy.Symbol, int]:
        return self.plan.values(self.sizes, self.keys, self.loads)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def group(self) -> int:
        return self.heads // max(self.k.shape[1], 1)

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.heads, self.rows, self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def oracle(self) -> torch.dtype | None:
        return torch.float64 if self.dtype == torch.float64 else None

    def chunks(self) -> Iterator[tuple[range, range]]:
        """(batches, query heads) that are worked on together, whole groups of heads."""
        room = max(1, ELEMENTS // (min(ROWS, self.rows) * self.keys * self.group))
        if room >= self.k.shape[1]:
            step = room // self.k.shape[1]
            for b in range(0, self.batch, step):
                yield range(b, min(b + step, self.batch)), range(self.heads)
            return
        for b in range(self.batch):
            for h in range(0, self.heads, room * self.group):
                yield range(b, b + 1), range(h, min(h + room * self.group, self.heads))

    def blocks(self, rows: range) -> Iterator[Block]:
        """All blocks of some rows, those of one chunk after another."""
        for batches, heads in self.chunks():
            step = max(1, min(ROWS, ELEMENTS // (len(batches) * len(heads) * self.keys)))
            for first in range(rows.start, rows.stop, step):
                yield self.block(batches, heads, range(first, min(first + step, rows.stop)))

    def block(self, batches: range, heads: range, rows: range) -> Block:
        keys, full = self._keys(rows)
        return Block(
            batches, heads, rows, keys if self.kept is None else self._kept_keys(self.kept, batches, heads, rows, keys), full
        )

    @cached_property
    def kept(self) -> Tensor | None:
        """Whether the mask may keep something of a tile, bool (B or 1, H or 1, tiles of TILE[0] rows, tiles of TILE[1] keys); None
        where its bounds say as much."""
        keep, few = self.plan.site.keep, self.keys < lists.KEYS or self.rows < TILE[0]
        if few or self.q.device.type != "cpu" or not lists.decidable(self.plan):
            return None
        batch, heads = (n if expr.depends_on(keep, name) else 1 for n, name in ((self.batch, "b"), (self.heads, "h")))
        tiling = Tiling(batch, heads, self.rows, self.keys, *TILE)
        return kinds(enclose(keep), tiling, self.loads, self.values, self.q.device)[1]

    def _kept_keys(self, kept: Tensor, batches: range, heads: range, rows: range, keys: range) -> range:
        """The part of ``keys`` from the first tile to the last that any batch and head of the block keeps something of."""
        runs = [slice(r.start, r.stop) if n > 1 else slice(None) for r, n in zip((batches, heads), kept.shape, strict=False)]
        tiles = kept[(*runs, slice(rows.start // TILE[0], -(-rows.stop // TILE[0])))].flatten(0, 2).any(0).nonzero()
        if not len(tiles):
            return range(keys.start, keys.start)
        lo = max(keys.start, int(tiles[0]) * TILE[1])
        return range(lo, max(lo, min(keys.stop, (int(tiles[-1]) + 1) * TILE[1])))

    def _keys(self, rows: range) -> tuple[range, bool]:
        everything = range(self.keys)
        bounds = self.plan.key_bounds
        if bounds is None:
            return everything, not self.plan.masked
        ends = [self._end(c, rows) for c in (bounds.lo, bounds.full_lo, bounds.full_hi, bounds.hi)]
        lo = max([0, *ends[0]])
        hi = max(lo, min([self.keys, *ends[3]]))
        full = bounds.full and lo >= max([0, *ends[1]]) and hi <= min([self.keys, *ends[2]])
        return range(min(lo, self.keys), min(hi, self.keys)), full

    def _end(self, candidates: Candidates, rows: range) -> list[int]:
        run = {"first": rows[0], "last": rows[-1], "": 0}
        values = {**self.values, FIRST: rows[0], LAST: rows[-1]}
        return [run[anchor] + int(integer(offset, values)) for anchor, offset in candidates]

    def all_keys(self, block: Block) -> Block:
        return Block(block.batches, block.heads, block.rows, range(self.keys), not self.plan.masked)

    def grid(self, block: Block) -> dict[str, Tensor]:
        device = self.q.device
        axes = {"b": block.batches, "h": block.heads, "i": block.rows, "j": block.keys}
        shape = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "i": (-1, 1), "j": (-1,)}
        return {name: torch.arange(r.start, r.stop, device=device).view(shape[name]) for name, r in axes.items()}

    def rows_of(self, t: Tensor, block: Block) -> Tensor:
        """Rows of a (B,H,M,X) tensor in the working dtype, heads of one group stacked: (B',HK',G*R,X)."""
        return self.stacked(t[block.place].to(self.dtype))

    def stacked(self, t: Tensor) -> Tensor:
        """(B',H',R,X) -> (B',HK',G*R,X)."""
        return t.reshape(t.shape[0], t.shape[1] // self.group, self.group * t.shape[2], t.shape[3])

    def unstacked(self, t: Tensor) -> Tensor:
        """(B',HK',G*R,X) -> (B',H',R,X)."""
        return t.reshape(t.shape[0], t.shape[1] * self.group, t.shape[2] // self.group, t.shape[3])

    def keys_of(self, t: Tensor, block: Block) -> Tensor:
        """The part of a (B,HK,N,X) tensor that a block meets, in the working dtype."""
        return t[self.place_of_keys(block)].to(self.dtype)

    def place_of_keys(self, block: Block) -> tuple[slice, slice, slice]:
        g = self.group
        heads = slice(block.heads.start // g, block.heads.stop // g)
        return slice(block.batches.start, block.batches.stop), heads, slice(block.keys.start, block.keys.stop)

    def logits(self, block: Block, dot: Tensor) -> Tensor:
        """Natural logits (B',H',R,C) from raw dots, before the mask."""
        return self.evaluated(self.plan.site.score, block, dot).to(self.dtype).expand(dot.shape)

    def evaluated(self, e: Expr, block: Block, dot: Tensor) -> Tensor:
        """A formula of the raw dots, broadcastable to (B',H',R,C)."""
        return evaluate(e, self.grid(block), self.loads, self.values, score=dot, dtype=self.oracle, known=self.known(e, block))

    def slope(self, block: Block, dot: Tensor) -> Tensor:
        """d logits / d dot, broadcastable to (B',H',R,C)."""
        e = self.plan.score_derivative
        if e is None:
            raise RuntimeError("the score program of this attention has no derivative, and none was planned")
        return self.evaluated(e, block, dot)

    def keep(self, block: Block) -> Tensor | None:
        """The mask, broadcastable to (B',H',R,C); None where all of the block is kept."""
        if block.full:
            return None
        e = self.plan.site.keep
        return evaluate(e, self.grid(block), self.loads, self.values, known=self.known(e, block))

    def factor(self, block: Block) -> Tensor | None:
        """What multiplies the probabilities after the softmax, broadcastable to (B',H',R,C): weight and dropout; None for 1."""
        e, drop = self.plan.weight, self.dropout(block)
        if e is None:
            return drop
        found = evaluate(e, self.grid(block), self.loads, self.values, dtype=self.oracle, known=self.known(e, block)).to(self.dtype)
        return found if drop is None else found * drop

    def dropout(self, block: Block) -> Tensor | None:
        p = self.plan.site.dropout
        if p == 0.0:
            return None
        if self.seed is None:
            raise ValueError("dropout needs a seed: an int64 tensor of one element")
        g = self.grid(block)
        return dropout_scale(self.seed, g["b"], g["h"], g["i"], g["j"], self.heads, p)

    def known(self, e: Expr, block: Block) -> dict[Expr, Tensor]:
        """Loads that are slices or diagonals of a tensor, read without gathering."""
        loads = [n for n in expr.walk(e) if isinstance(n, Load)]
        views = {n: self._view(n, block) for n in loads}
        return {n: t for n, t in views.items() if t is not None}

    def _view(self, load: Load, block: Block) -> Tensor | None:
        assert isinstance(load.slot, int)
        source = self.loads[load.slot]
        if self.oracle is not None and source.is_floating_point():
            source = source.to(self.oracle)
        if load.slot >= self.plan.given and self.plan.tables[load.slot - self.plan.given].relative:
            return self._diagonals(source, block)
        names = [next((n for n, s in INDEX.items() if isinstance(x, Int) and x.value == s), None) for x in load.indices]
        zero = [isinstance(x, Int) and x.value == 0 for x in load.indices]
        if not all(n or z for n, z in zip(names, zero, strict=True)) or len({n for n in names if n}) < len([n for n in names if n]):
            return None
        runs = {"b": block.batches, "h": block.heads, "i": block.rows, "j": block.keys}
        part = source[tuple(slice(runs[n].start, runs[n].stop) if n else 0 for n in names)]
        kept = [n for n in names if n]
        part = part.permute([kept.index(n) for n in "bhij" if n in kept])
        return part[tuple(slice(None) if n in kept else None for n in "bhij")]

    def _diagonals(self, table: Tensor, block: Block) -> Tensor:
        """table[h, i - j + N - 1] as (1, H' or 1, R, C)."""
        first = block.rows[0] - (block.keys.stop - 1) + self.keys - 1
        window = table if table.shape[0] == 1 else table[block.heads.start : block.heads.stop]
        window = window[:, first : first + len(block.rows) + len(block.keys) - 1]
        # row r of `unfold` holds i - j ascending, which is j descending
        return window.unfold(-1, len(block.keys), 1).flip(-1)[None] if len(block.keys) else window[None, :, None, :0]
