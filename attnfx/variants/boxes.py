"""Attention in which a token of a layout sees a box of it: an interval of every axis, once the axis is put in a fitting order.

Windows, neighbourhoods, their dilated and strided forms and groups of a grid are all of this kind. The tokens are attended in an
order that puts tiles of the layout together, so that a tile of queries meets few tiles of keys: in the order of rows, 64 keys of an
image 64 wide are one row of it, and a neighbourhood cuts all rows that it reaches. What a token sees is read from a table of three
numbers an axis, whose least and largest in a tile decide the tile.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants.base import Variant

#: Queries and keys of the tiles that kernels skip.
ROWS, KEYS = 64, 64
#: What an order that only a gather gives may cost beside one of views.
UNEVEN = 1.15
#: Shapes of tiles that are counted out.
COUNTED = 6


@dataclass(frozen=True)
class Axis:
    """One axis of a layout, by its coordinate x: x stands at ``place[x]``, and sees the places from ``low[x]`` to ``high[x]``.

    ``starts``: the places at which runs begin that no token sees past (a residue class, a window), the first is 0. ``dilation``:
    places of a run are so far apart along the axis, if the runs are its residue classes.
    """

    place: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    dilation: int = 1

    @property
    def length(self) -> int:
        return len(self.place)

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """How many places each run has."""
        return tuple(b - a for a, b in itertools.pairwise((*self.starts, self.length)))

    @property
    def whole(self) -> bool:
        """Whether every coordinate sees all others."""
        return min(self.high) == self.length - 1 and max(self.low) == 0

    @property
    def first(self) -> Axis | None:
        """The first run on its own, where all runs are like it."""
        seen = dict(zip(self.place, zip(self.low, self.high, strict=True), strict=True))
        n = self.runs[0]
        alike = all(seen[p] == (seen[p % n][0] + p // n * n, seen[p % n][1] + p // n * n) for p in seen)
        if not (self.even(1) and alike):
            return None
        return Axis(tuple(range(n)), tuple(seen[p][0] for p in range(n)), tuple(seen[p][1] for p in range(n)))

    def even(self, tile: int) -> bool:
        """Whether all runs are as long as the first, in whole tiles."""
        return len(set(self.runs)) == 1 and self.runs[0] % tile == 0

    def keys(self, tile: int) -> Tensor:
        """(L, 3): of each coordinate its run, its tile in the run, and its place in the tile."""
        place, starts = torch.tensor(self.place), torch.tensor(self.starts)
        run = torch.searchsorted(starts, place, right=True) - 1
        inside = place - starts[run]
        return torch.stack([run, inside // tile, inside % tile], -1)


@dataclass(frozen=True)
class Boxes:
    """A layout in which a token sees the box of what the axes let it see, with ``extra`` tokens before it (``extra_first``) or
    behind it that see all and are seen by all."""

    axes: tuple[Axis, ...]
    extra: int = 0
    extra_first: bool = False

    @property
    def cells(self) -> int:
        return math.prod(a.length for a in self.axes)

    @property
    def group(self) -> Boxes | None:
        """What is attended in each group of runs, where they are alike; None where they are not, or there is one."""
        firsts = [a.first for a in self.axes]
        apart = any(len(a.starts) > 1 for a in self.axes)
        return Boxes(tuple(a for a in firsts if a is not None)) if apart and None not in firsts and not self.extra else None

    def tile(self, ranges: bool) -> tuple[int, ...]:
        """Sizes of a tile along the axes, with KEYS tokens at most: of those the one whose order lets blocks of ROWS queries meet
        the least tiles of KEYS keys, or a few more where no tile is cut, so that views and a copy give the order. The most
        promising ones are counted. ``ranges``: a block meets all tiles from the first to the last that it sees."""
        powers = [2**n for n in range(KEYS.bit_length())]

        def cost(shape: tuple[int, ...]) -> float:
            spans = zip(self.axes, self._spans(shape, ROWS), self._spans(shape, KEYS), strict=True)
            return math.prod(_met(*each) for each in spans) * (1.0 if self.even(shape) else UNEVEN)

        def count(shape: tuple[int, ...]) -> float:
            return self._tiles_met(shape, ranges) * (1.0 if self.even(shape) else UNEVEN)

        shapes = itertools.product(*([t for t in powers if t <= max(a.runs)] for a in self.axes))
        # of equal ones those that fill a tile: it is then a box, counted as it lies
        promising = sorted((s for s in shapes if math.prod(s) <= KEYS), key=lambda s: (cost(s), -math.prod(s)))[:COUNTED]
        return min((*promising, (1,) * len(self.axes)), key=count)

    def _tiles_met(self, tile: tuple[int, ...], ranges: bool) -> int:
        """How many tiles of keys the blocks of queries meet, in the order that ``tile`` gives."""
        rows = self.table(self.order(tile)).long()
        met = torch.ones((), dtype=torch.bool)
        for n in range(len(self.axes)):
            place, low, high = rows[1 + 3 * n : 4 + 3 * n]
            met = met & (_by(low, ROWS).amin(1)[:, None] <= _by(place, KEYS).amax(1))
            met = met & (_by(high, ROWS).amax(1)[:, None] >= _by(place, KEYS).amin(1))
        if ranges:
            at = torch.arange(met.shape[1])
            first, last = at.where(met, met.shape[1]).amin(1), at.where(met, -1).amax(1)
            return int((last - first + 1).sum())
        return int(met.sum())

    def _spans(self, tile: tuple[int, ...], tokens: int) -> list[int]:
        """How far along each axis that many tokens in turn reach, which begin with a tile."""
        found, turns = [], tokens // math.prod(tile)
        for axis, t in reversed(list(zip(self.axes, tile, strict=True))):
            run = max(axis.runs)
            tiles = min(turns, -(-run // t))
            turns = -(-turns // tiles)
            found.append(min(t * tiles, run))
        return found[::-1]

    def even(self, tile: tuple[int, ...]) -> bool:
        """Whether no tile is cut."""
        return all(a.even(t) for a, t in zip(self.axes, tile, strict=True))

    def order(self, tile: tuple[int, ...]) -> Tensor:
        """The tokens in the order in which they are attended, int64: those of a tile together, the further ones last."""
        sizes = [a.length for a in self.axes]
        where = torch.unravel_index(torch.arange(self.cells), sizes)
        parts = [a.keys(t)[x] for a, t, x in zip(self.axes, tile, where, strict=True)]
        rank = torch.zeros(self.cells, dtype=torch.int64)
        for part in range(3):
            for each in parts:
                rank = rank * (int(each[:, part].max()) + 1) + each[:, part]
        first = self.extra if self.extra_first else 0
        cells, further = rank.argsort() + first, torch.arange(self.extra)
        return torch.cat([cells, further if self.extra_first else further + self.cells])

    def table(self, order: Tensor) -> Tensor:
        """(1 + 3 A, N), int32: the token at each place of an order; of each axis its place, and the least and the largest that it
        sees. A further token stands at -1 and sees from there on."""
        first = self.extra if self.extra_first else 0
        at = (order - first).clamp(0, self.cells - 1)
        further = (order < first) | (order >= first + self.cells)
        rows = [order]
        for axis, x in zip(self.axes, torch.unravel_index(at, [a.length for a in self.axes]), strict=True):
            rows += [torch.tensor(ends)[x].masked_fill(further, -1) for ends in (axis.place, axis.low)]
            rows.append(torch.tensor(axis.high)[x].masked_fill(further, axis.length))
        return torch.stack(rows).int()

    def sizes(self, tile: tuple[int, ...]) -> list[int]:
        """The layout as :meth:`order` takes it apart where it is even: of each axis its runs, tiles, places, and dilation."""
        found = []
        for a, t in zip(self.axes, tile, strict=True):
            found += [len(a.starts) // a.dilation, a.runs[0] // t, t, a.dilation]
        return found


def parted(length: int, starts: tuple[int, ...], reach: int = 0) -> Axis:
    """Parts of an axis, from one start to the next, in which all see the part, and ``reach`` on either side of it."""
    ends = zip(starts, (*starts[1:], length), strict=True)
    seen = [(max(a - reach, 0), min(b - 1 + reach, length - 1)) for a, b in ends for _ in range(a, b)]
    low, high = zip(*seen, strict=True)
    return Axis(tuple(range(length)), low, high, (0,) if reach else starts)


def classes(length: int, modulus: int) -> Axis:
    """The classes of an axis modulo a number, one after another, in which all see the class."""
    starts = tuple(itertools.accumulate((-(-(length - g) // modulus) for g in range(modulus - 1)), initial=0))
    ends = (*starts[1:], length)
    by = [x % modulus for x in range(length)]
    place = tuple(starts[g] + x // modulus for x, g in enumerate(by))
    return Axis(place, tuple(starts[g] for g in by), tuple(ends[g] - 1 for g in by), starts, modulus)


@lru_cache(maxsize=1024)
def _met(axis: Axis, rows: int, keys: int) -> float:
    """How many places, in tiles of ``keys``, a block of ``rows`` places meets on average."""
    ends = dict(zip(axis.place, zip(axis.low, axis.high, strict=True), strict=True))
    met = blocks = 0
    for start, run in zip(axis.starts, axis.runs, strict=True):
        for first in range(start, start + run, rows):
            seen = [ends[p] for p in range(first, min(first + rows, start + run))]
            low, high = min(a for a, _ in seen) - start, max(b for _, b in seen) - start
            met += min((high // keys + 1) * keys, run) - low // keys * keys
            blocks += 1
    return met / blocks


def _by(x: Tensor, size: int) -> Tensor:
    """(N,) as rows of ``size``, the last one filled with its last element."""
    return torch.cat([x, x[-1:].expand(-len(x) % size)]).view(-1, size)


def objections(site: AttentionSite, layout: tuple[int, ...], extra: int = 0) -> tuple[str, ...]:
    """Why ``site`` does not attend over a layout of tokens, and ``extra`` more."""
    wanted = math.prod(layout) + extra
    if site.queries == site.keys == wanted:
        return ()
    further = f" and {extra} further tokens" if extra else ""
    return (
        f"There are {site.queries} queries and {site.keys} keys; the layout {' x '.join(map(str, layout))}{further} "
        f"has {wanted} tokens, and needs as many of both.",
    )


def pairs(boxes: Boxes) -> sympy.Expr:
    """How many pairs of a query and a key one head computes."""
    seen = math.prod(sum(b - a + 1 for a, b in zip(axis.low, axis.high, strict=True)) for axis in boxes.axes)
    return sympy.Integer(seen + 2 * boxes.cells * boxes.extra + boxes.extra**2)


def check_layout(variant: Variant, name: str = "layout", ranks: tuple[int, ...] = (1, 2, 3)) -> None:
    """Refuse a layout that is no tuple of one to three sizes."""
    sizes = getattr(variant, name)
    whole = isinstance(sizes, tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    if not whole or len(sizes) not in ranks:
        raise PolicyError(
            f"{type(variant).__name__}.{name} is {sizes!r}; it must be {' or '.join(map(str, ranks))} whole numbers of at least 1."
        )


def of_axes(variant: Variant, name: str) -> tuple[int, ...]:
    """A parameter as one number for each axis of the layout."""
    value, rank = getattr(variant, name), len(variant.to_dict()["layout"])
    numbers = value if isinstance(value, tuple) else (value,) * rank
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if len(numbers) != rank or not whole:
        raise PolicyError(f"{type(variant).__name__}.{name} is {value!r}; it must be one whole number, or {rank} of them.")
    return numbers


def with_extra(seen: Tensor, extra: int, first: bool) -> Tensor:
    """What the tokens of a layout see, (N, N), with ``extra`` further ones that see all and are seen by all, for the oracles."""
    ends = (extra, 0) if first else (0, extra)
    return torch.nn.functional.pad(seen, (*ends, *ends), value=True)
