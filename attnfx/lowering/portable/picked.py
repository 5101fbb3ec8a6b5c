"""Which tiles of keys a block of query rows reads, where the mask is more than closed-form bounds, and which blocks that makes.

The tiles are those of `algebra/tiling.py`: nothing of an empty one is kept, all of a full one. Rows, heads and batches that keep
alike are worked on together; those that do not are taken apart where that reads fewer keys than it makes calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from attnfx.algebra.intervals import Enclosure

#: Rows of a tile, and its keys: of tables of blocks a block, but not fewer than the least.
ROWS, COLUMNS, LEAST = 64, 32, 16
#: What one more block costs, in scores, and the part of a range of keys above which all of it is read as it lies.
CALL, WORTHWHILE = 1 << 16, 0.9


def tile(found: Enclosure) -> tuple[int, int]:
    """Rows and keys of the tiles that a mask is judged by."""
    blocks = [p.steps[1] for p in found.profiles if p.side == "ij"]
    return ROWS, max(LEAST, min([COLUMNS, *blocks]))


@dataclass(frozen=True)
class Picked:
    """Keys that some rows read, ascending. ``at``: their positions (C,), None where they are all of the range ``keys``.
    ``unsure``: the columns (among these C) that the mask has to be asked about, None for all of them."""

    keys: range
    at: Tensor | None
    unsure: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Query rows of a block, and how many batches and key heads it has: one where they are taken apart."""

    rows: int
    batches: int
    key_heads: int


@dataclass(frozen=True)
class Kept:
    """``must`` (kept entirely) and ``may`` (kept somewhere) of each tile, bool (B or 1, H or 1, row tiles, key tiles);
    ``columns`` is the width of a tile."""

    must: Tensor
    may: Tensor
    columns: int

    def pick(self, batches: range, heads: range, rows: range, keys: range, gather: bool) -> Picked:
        """What of ``keys`` the block reads: the tiles that any of its batches, heads and rows keeps something of. Without
        ``gather`` the range from the first to the last of them."""
        runs = [slice(r.start, r.stop) if n > 1 else slice(None) for r, n in zip((batches, heads), self.may.shape, strict=False)]
        place = (*runs, slice(rows.start // ROWS, -(-rows.stop // ROWS)))
        tiles = self.may[place].flatten(0, 2).any(0).nonzero()[:, 0]
        if not len(tiles):
            return Picked(range(keys.start, keys.start), None, None)
        first, last = int(tiles[0]), int(tiles[-1])
        lo = max(keys.start, first * self.columns)
        keys = range(lo, max(lo, min(keys.stop, (last + 1) * self.columns)))
        scattered = gather and len(tiles) < WORTHWHILE * (last + 1 - first)
        if not scattered:
            tiles = torch.arange(first, last + 1, device=tiles.device)
        sure = self.must[place].flatten(0, 2).all(0)[tiles]
        at = (tiles[:, None] * self.columns + torch.arange(self.columns, device=tiles.device)).flatten()
        inside = slice(int((at < keys.start).sum()), int((at < keys.stop).sum()))
        at, doubts = at[inside], (~sure).repeat_interleave(self.columns)[inside].nonzero()[:, 0]
        few = 2 * len(doubts) < len(at)
        return Picked(keys, at if scattered else None, doubts if few else None)

    def layout(self, batch: int, heads: int, group: int, steps: Sequence[int]) -> Layout:
        """The cheapest layout with one of these numbers of rows, where all ``batch`` and ``heads`` could be worked on together."""
        apart = [
            (1, n) if kept > 1 and n > 1 else (n,) for kept, n in zip(self.may.shape[:2], (batch, heads // group), strict=True)
        ]
        found = {}
        for rows, b, h in product(steps, *apart):
            found[self._cost(rows, batch // b, heads // group // h, batch * heads)] = Layout(rows, b, h)
        return found[min(found)]

    def _cost(self, rows: int, batches: int, groups: int, copies: int) -> float:
        """Scores that are computed, and blocks."""
        of_heads = groups if self.may.shape[1] > 1 else 1
        of_batches = batches if self.may.shape[0] > 1 else 1
        step = -(-rows // ROWS)
        tiles = torch.unflatten(functional.pad(self.may, (0, 0, 0, -self.may.shape[2] % step)), 2, (-1, step)).any(3)
        tiles = torch.unflatten(torch.unflatten(tiles, 1, (of_heads, -1)).any(2), 0, (of_batches, -1)).any(1)
        count = int(tiles.sum()) * self.columns * step * ROWS
        return float(count * copies / (of_batches * of_heads)) + CALL * batches * groups * tiles.shape[2]
