"""Blocks of the score matrix: which there are, and the logits of one. Shared by forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, integer
from attnfx.algebra.intervals import enclose
from attnfx.algebra.tiling import Tiling, kinds
from attnfx.expr import INDEX, Expr, Int, Load
from attnfx.lowering import blocks as lists
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable import picked as tiles
from attnfx.lowering.portable.philox import dropout_scale
from attnfx.lowering.portable.picked import Kept, Layout
from attnfx.lowering.ranges import FIRST, LAST, Candidates

#: Scores in one block: 4 MB of float32.
ELEMENTS = 1 << 20
#: Rows of a block, where that many fit.
ROWS = 128
#: Rows of a block where tiles of keys are picked.
STEPS = (ROWS // 2, ROWS)


@dataclass(frozen=True)
class Block:
    """Rows of queries against a range of keys, for some batches and query heads. ``full``: every one of these keys is kept.

    ``at`` (C,) are the positions of the keys that it reads, None for all of the range; ``unsure`` the columns of those that the
    mask has to be asked about, None for all.
    """

    batches: range
    heads: range
    rows: range
    keys: range
    full: bool
    at: Tensor | None = None
    unsure: Tensor | None = None

    @property
    def width(self) -> int:
        """C: how many keys it reads."""
        return len(self.keys) if self.at is None else len(self.at)

    def pieces(self) -> Iterator[tuple[slice, range]]:
        """Its keys in runs of neighbours: (columns of the block, positions)."""
        if self.at is None:
            yield slice(None), self.keys
            return
        ends = [0, *((self.at.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(self.at)]
        starts = self.at[torch.tensor(ends[:-1], device=self.at.device)].tolist() if len(self.at) else []
        for first, past, start in zip(ends[:-1], ends[1:], starts, strict=True):
            yield slice(first, past), range(start, start + past - first)

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

    def chunks(self, batches: range, heads: range) -> Iterator[tuple[range, range]]:
        """(batches, query heads) among those given that are worked on together, whole groups of heads."""
        layout = self.layout(STEPS)
        key_heads = min(len(heads) // self.group, layout.key_heads) if layout is not None else len(heads) // self.group
        room = max(1, ELEMENTS // (min(ROWS, self.rows) * self.keys * self.group))
        if room >= key_heads and key_heads * self.group == len(heads):
            step = room // key_heads if layout is None else min(room // key_heads, layout.batches)
            for b in range(batches.start, batches.stop, step):
                yield range(b, min(b + step, batches.stop)), heads
            return
        step = min(room, key_heads) * self.group
        for b in batches:
            for h in range(heads.start, heads.stop, step):
                yield range(b, b + 1), range(h, min(h + step, heads.stop))

    def blocks(self, rows: range, batches: range | None = None, heads: range | None = None) -> Iterator[Block]:
        """All blocks of some rows (of some batches and heads), those of one chunk after another."""
        if self.empty:
            return
        layout = self.layout(STEPS)
        for b, h in self.chunks(batches or range(self.batch), heads or range(self.heads)):
            step = max(1, min(ROWS if layout is None else layout.rows, ELEMENTS // (len(b) * len(h) * self.keys)))
            if (skip := self.plan.site.skip) is not None:  # no tile is worked on in parts
                step = max(skip.rows, step // skip.rows * skip.rows)
            for first in range(rows.start, rows.stop, step):
                yield self.block(b, h, range(first, min(first + step, rows.stop)))

    def block(self, batches: range, heads: range, rows: range) -> Block:
        keys, full = self._keys(rows)
        if self.kept is None:
            return Block(batches, heads, rows, keys, full)
        picked = self.kept.pick(batches, heads, rows, keys, self.plan.site.band is None)
        full = full or (picked.unsure is not None and not len(picked.unsure))
        return Block(batches, heads, rows, picked.keys, full, picked.at, picked.unsure)

    @cached_property
    def kept(self) -> Kept | None:
        """The tiles that the mask keeps something of; None where its bounds say as much."""
        keep, few = self.plan.site.keep, self.keys < lists.KEYS or self.rows < tiles.ROWS
        if few or self.q.device.type != "cpu" or not lists.decidable(self.plan):
            return None
        batch, heads = (n if expr.depends_on(keep, name) else 1 for n, name in ((self.batch, "b"), (self.heads, "h")))
        found = enclose(keep)
        rows, columns = tiles.tile(found)
        tiling = Tiling(batch, heads, self.rows, self.keys, rows, columns)
        return Kept(*kinds(found, tiling, self.loads, self.values, self.q.device), columns)

    def layout(self, steps: tuple[int, ...]) -> Layout | None:
        """Which rows, batches and heads are worked on together; None without tiles."""
        if self.kept is None:
            return None
        if steps not in self.layouts:
            self.layouts[steps] = self.kept.layout(self.batch, self.heads, self.group, steps)
        return self.layouts[steps]

    @cached_property
    def layouts(self) -> dict[tuple[int, ...], Layout]:
        """Those chosen so far."""
        return {}

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
        at = {name: torch.arange(r.start, r.stop, device=device) for name, r in axes.items() if name != "j" or block.at is None}
        if block.at is not None:
            at["j"] = block.at
        return {name: t.view(shape[name]) for name, t in at.items()}

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
        return self.read(t, block).to(self.dtype)

    def read(self, t: Tensor, block: Block) -> Tensor:
        """The part of a (B,HK,N,X) tensor that a block meets: (B',HK',C,X)."""
        found = t[self.place_of_keys(block)]
        return found if block.at is None else found.index_select(2, block.at)

    def add(self, total: Tensor, part: Tensor, block: Block) -> None:
        """Adds what a block has, (B',HK',C,X), to a (B,HK,N,X) tensor. No key is met twice, so that no order decides."""
        place = total[self.place_of_keys(block)]
        if block.at is None:
            place += part
        else:
            place[:, :, block.at] += part

    def place_of_keys(self, block: Block) -> tuple[slice, slice, slice]:
        """Where the range of keys is in a (B,HK,N,X) tensor; all keys where positions say which."""
        g = self.group
        heads = slice(block.heads.start // g, block.heads.stop // g)
        keys = slice(block.keys.start, block.keys.stop) if block.at is None else slice(None)
        return slice(block.batches.start, block.batches.stop), heads, keys

    def logits(self, block: Block, dot: Tensor) -> Tensor:
        """Natural logits (B',H',R,C) from raw dots, before the mask."""
        return self.evaluated(self.plan.site.score, block, dot).to(self.dtype).expand(dot.shape)

    def evaluated(self, e: Expr, block: Block, dot: Tensor) -> Tensor:
        """A formula of the raw dots, broadcastable to (B',H',R,C)."""
        return evaluate(e, self.grid(block), self.loads, self.values, score=dot, dtype=self.oracle, known=self.known(e, block))

    def rounded(self, e: Expr, block: Block, dot: Tensor) -> Tensor:
        """:meth:`evaluated` in the formula's own types also where the operands are float64, and what is narrower rounds."""
        if self.oracle is None:
            return self.evaluated(e, block, dot)
        return evaluate(e, self.grid(block), self.loads, self.values, score=dot)

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
        if block.unsure is not None:
            part = self.unsure(block, block.unsure)
            whole = part.new_ones((*part.shape[:-1], block.width))
            whole[..., block.unsure] = part
            return whole
        return evaluate(e, self.grid(block), self.loads, self.values, known=self.known(e, block))

    def unsure(self, block: Block, columns: Tensor) -> Tensor:
        """The mask of some columns of a block."""
        positions = torch.arange(block.keys.start, block.keys.stop, device=self.q.device) if block.at is None else block.at
        found = self.keep(replace(block, full=False, at=positions[columns], unsure=None))
        assert found is not None
        return found

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
            return self._diagonals(source, block) if block.at is None else None
        names = [next((n for n, s in INDEX.items() if isinstance(x, Int) and x.value == s), None) for x in load.indices]
        zero = [isinstance(x, Int) and x.value == 0 for x in load.indices]
        if not all(n or z for n, z in zip(names, zero, strict=True)) or len({n for n in names if n}) < len([n for n in names if n]):
            return None
        runs = {"b": block.batches, "h": block.heads, "i": block.rows, "j": block.keys if block.at is None else range(self.keys)}
        part = source[tuple(slice(runs[n].start, runs[n].stop) if n else 0 for n in names)]
        kept = [n for n in names if n]
        if block.at is not None and "j" in kept:
            part = part.index_select(kept.index("j"), block.at)
        part = part.permute([kept.index(n) for n in "bhij" if n in kept])
        return part[tuple(slice(None) if n in kept else None for n in "bhij")]

    def _diagonals(self, table: Tensor, block: Block) -> Tensor:
        """table[h, i - j + N - 1] as (1, H' or 1, R, C)."""
        first = block.rows[0] - (block.keys.stop - 1) + self.keys - 1
        window = table if table.shape[0] == 1 else table[block.heads.start : block.heads.stop]
        window = window[:, first : first + len(block.rows) + len(block.keys) - 1]
        # row r of `unfold` holds i - j ascending, which is j descending
        return window.unfold(-1, len(block.keys), 1).flip(-1)[None] if len(block.keys) else window[None, :, None, :0]
