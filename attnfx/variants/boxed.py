"""Attention of boxes: the tokens are attended in the order of tiles, under a mask that knows their places.

Where no tile is cut, that order is one of digits, which the attention follows itself; else the tokens are put in order and back.
Groups of tokens that see nothing of each other, all alike and not small, are further examples of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra import fields
from attnfx.expr import INDEX, Expr, Int
from attnfx.site import AttentionSite
from attnfx.sites.ordering import Order
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.boxes import Boxes

#: Tokens of a group that are enough to be attended on their own.
SMALLEST = 32
I, J = expr.index("i"), expr.index("j")


def attended(attend: Attend, query: Tensor, key: Tensor, value: Tensor, boxes: Boxes) -> Tensor:
    """The attention of ``attend`` in which the tokens see what ``boxes`` lets them, and the model."""
    site = attend.site
    free, causal = movable(site)
    group = boxes.group
    if group is None or group.cells < SMALLEST or causal or not free or site.side:
        return _attended(attend, site, query, key, value, boxes)
    groups, cells, apart = boxes.cells // group.cells, group.cells, in_order(boxes)
    query, key, value = (apart.moved(attend, x) for x in (query, key, value))
    query, key, value = (_stacked(x, groups) for x in (query, key, value))
    alone = site.replace(batch=site.batch * groups, queries=sympy.Integer(cells), keys=sympy.Integer(cells))
    out = _attended(attend, alone, query, key, value, group)
    return apart.back(attend, _unstacked(out, groups))


def _stacked(x: Tensor, groups: int) -> Tensor:
    """(B, H, groups * n, D) as (B * groups, H, n, D)."""
    return torch.flatten(torch.transpose(torch.unflatten(x, 2, [groups, -1]), 1, 2), 0, 1)


def _unstacked(x: Tensor, groups: int) -> Tensor:
    return torch.flatten(torch.transpose(torch.unflatten(x, 0, [-1, groups]), 1, 2), 2, 3)


def _attended(attend: Attend, whole: AttentionSite, query: Tensor, key: Tensor, value: Tensor, boxes: Boxes) -> Tensor:
    free, causal = movable(whole)
    made = _arranged(boxes, free, ranges=attend.site.device == "cpu")  # whose blocks read a range of keys
    site, slot = beside(whole, made.table.shape, torch.int32)
    near = visible(made, slot, free)
    if near == expr.TRUE:
        return attend(whole, query, key, value)
    if not free:
        return attend(site.replace(keep=expr.logical_and(site.keep, near)), query, key, value, [attend.constant(made.table)])
    if causal:
        near = expr.logical_and(near, expr.le(_number(slot, 0, J), _number(slot, 0, I)))
    # a token sees itself, so no row is empty
    site = site.replace(keep=near, fill=-math.inf, additive=False, empty_rows="zero")
    table = [attend.constant(made.table)]
    if made.digits is not None and not boxes.extra:  # the attention reads its tokens in that order
        return attend(site.replace(order=None if made.digits.trivial else made.digits), query, key, value, table)
    query, key, value = (made.moved(attend, x) for x in (query, key, value))
    return made.back(attend, attend(site, query, key, value, table))


@dataclass(frozen=True)
class Arranged:
    """A layout in an order: ``tile`` gives it, or else it is the model's own."""

    boxes: Boxes
    tile: tuple[int, ...]

    @cached_property
    def order(self) -> Tensor:
        return self.boxes.order(self.tile) if self.tile else torch.arange(self.boxes.cells + self.boxes.extra)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bits of the places of each axis that somebody does not see whole, where several fit into one number; else (). A kernel
        computes places of which there is a formula faster than it compares packed ones."""
        if self.computed:
            return ()
        widths = tuple((a.length - 1).bit_length() for a in self.boxes.axes if not a.whole)
        return widths if len(widths) > 1 and fields.starts(widths)[-1] <= fields.BITS else ()

    @cached_property
    def table(self) -> Tensor:
        """(1 + 3 A, N) of :meth:`Boxes.table`; or (4, N): the token, and its places, least and largest, packed."""
        rows = self.boxes.table(self.order)
        if not self.widths:
            return rows
        some = [(n, a.length - 1) for n, a in enumerate(self.boxes.axes) if not a.whole]
        # a further token sees all places, and stands anywhere: who sees it knows by its number
        each = [[rows[1 + 3 * n + row].clamp(0, last) for n, last in some] for row in range(3)]
        return torch.stack([rows[0], *(fields.packed(numbers, self.widths) for numbers in each)])

    @cached_property
    def digits(self) -> Order | None:
        """The order of the layout's own tokens, where it is one of digits: no tile is cut."""
        boxes, rank = self.boxes, len(self.boxes.axes)
        if not self.tile or not boxes.even(self.tile):
            return None
        return Order(tuple(boxes.sizes(self.tile)), tuple(4 * a + part for part in (3, 0, 1, 2) for a in range(rank)))

    @property
    def computed(self) -> bool:
        """Whether the places of a token are a formula of its number."""
        return self.digits is not None and not self.boxes.extra

    def place(self, axis: int, slot: int, number: Expr) -> Expr:
        """Where along an axis the token of a number stands: by a formula, or by the table in ``slot``."""
        if self.digits is None or not self.computed:
            return _number(slot, 1 + 3 * axis, number)
        assert isinstance(number, Int)
        run, tile, place, dilation = (4 * axis + part for part in range(4))
        return Int(self.digits.number((dilation, run, tile, place), number.value))

    def moved(self, attend: Attend, x: Tensor) -> Tensor:
        """The rows of ``x`` (B, H, N, D) in the order in which they are attended."""
        if self.digits is None:
            return torch.index_select(x, 2, attend.constant(self.order))
        cells, further = _apart(x, self.boxes, self.boxes.extra_first)
        return _together(self.digits.moved(cells), further, False)

    def back(self, attend: Attend, x: Tensor) -> Tensor:
        """The inverse of :meth:`moved`."""
        if self.digits is None:
            return torch.index_select(x, 2, attend.constant(self.order.argsort()))
        cells, further = _apart(x, self.boxes, False)
        return _together(self.digits.back(cells), further, self.boxes.extra_first)


def in_order(boxes: Boxes) -> Arranged:
    """A layout whose runs, all alike, are put together, each in the order of rows."""
    return Arranged(boxes, (1,) * len(boxes.axes))


@lru_cache(maxsize=64)
def _arranged(boxes: Boxes, free: bool, ranges: bool) -> Arranged:
    return Arranged(boxes, boxes.tile(ranges) if free else ())


def visible(made: Arranged, slot: int, free: bool) -> Expr:
    """Whether the token at place i sees the one at place j, by the table in ``slot``."""
    near = _packed(slot, made.widths) if made.widths else _compared(made, slot)
    return expr.logical_or(near, _further(made.boxes, free)) if made.boxes.extra else near


def _packed(slot: int, widths: tuple[int, ...]) -> Expr:
    """Of a table with packed places."""
    place, low, high = (_number(slot, 1 + row, index) for row, index in enumerate((J, I, I)))
    return fields.inside(place, low, high, widths)


def _compared(made: Arranged, slot: int) -> Expr:
    """Of a table with three rows for each axis."""
    terms: list[Expr] = []
    for n, axis in enumerate(made.boxes.axes):
        if not axis.whole:
            low, high = (_number(slot, 1 + 3 * n + row, I) for row in (1, 2))
            place = made.place(n, slot, J)
            terms += [expr.le(low, place), expr.le(place, high)]
    return expr.logical_and(*terms)


def _number(slot: int, row: int, index: Expr) -> Expr:
    return read(slot, expr.integer(row), index, dtype=torch.int32)


def movable(site: AttentionSite) -> tuple[bool, bool]:
    """(whether the tokens may change places, as nothing but a causal mask knows them; whether there is a causal mask)."""
    facts = site.facts
    causal = facts.causal_offset == 0
    others = [e for e in (site.score, site.weight, site.sink) if e is not None]
    placed = any(isinstance(n, Int) and n.value.has(*(INDEX[x] for x in "bij")) for e in others for n in expr.walk(e))
    return (causal or site.keep == expr.TRUE) and not placed and site.band is None, causal


def _further(boxes: Boxes, free: bool) -> Expr:
    """Whether key j is one of the further tokens."""
    if boxes.extra_first and not free:
        return expr.lt(J, expr.integer(boxes.extra))
    return expr.le(expr.integer(boxes.cells), J)


def _apart(x: Tensor, boxes: Boxes, first: bool) -> tuple[Tensor, Tensor | None]:
    """(the tokens of the layout, the further ones), which are ``first`` or last."""
    if not boxes.extra:
        return x, None
    at = boxes.extra if first else 0
    return torch.narrow(x, 2, at, boxes.cells), torch.narrow(x, 2, 0 if first else boxes.cells, boxes.extra)


def _together(cells: Tensor, further: Tensor | None, first: bool) -> Tensor:
    if further is None:
        return cells
    return torch.cat([further, cells] if first else [cells, further], 2)
