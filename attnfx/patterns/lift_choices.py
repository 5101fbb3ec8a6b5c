"""Lifting rules of operations that compare an element with a few others: one-hot rows, membership, buckets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import is_tensor, sizes
from attnfx.patterns.lift import Index, Lifter, operation, position_rule
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.lift_values import _dtype

#: How many elements of a small axis are written out.
UNROLLED = 16


def static(size: Any) -> int | None:
    """A size as a number where it is one and small enough to be written out."""
    return int(size) if size.is_Integer and 0 < size <= UNROLLED else None


def _listed(lifter: Lifter, node: Any) -> list[Expr] | None:
    """The elements of a short tensor of rank one, as numbers."""
    if not is_tensor(node) or len(sizes(node)) != 1 or (count := static(sizes(node)[0])) is None:
        return None
    found = [lifter.element(node, (expr.integer(k),)) for k in range(count)]
    known = all(isinstance(x, expr.Const) or (isinstance(x, Int) and x.value.is_Integer) for x in found)
    return found if known else None


@position_rule("aten.one_hot")
def _one_hot(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return expr.cast(expr.eq(lifter.element(node.args[0], index[:-1]), index[-1]), torch.int64)


@position_rule("aten.isin")
def _isin(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    elements, tests = node.args[:2]
    if not is_tensor(elements) or any(_floating(x) for x in (elements, tests)):
        return None
    x = lifter.element(elements, index)
    members = list(_members(lifter, tests))
    if not members:
        return None
    found = expr.logical_or(*(expr.eq(x, y) for y in members))
    return expr.logical_not(found) if argument(node, 3, "invert", False) else found


def _members(lifter: Lifter, tests: Any) -> Iterator[Expr]:
    if not is_tensor(tests) or not sizes(tests):
        yield lifter.element(tests, ())
    elif len(sizes(tests)) == 1 and (count := static(sizes(tests)[0])) is not None:
        yield from (lifter.element(tests, (expr.integer(k),)) for k in range(count))


def _floating(x: Any) -> bool:
    return bool(x.meta["val"].dtype.is_floating_point) if is_tensor(x) else isinstance(x, float)


@position_rule("aten.bucketize", "aten.searchsorted")
def _bucket(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """How many boundaries lie below a value (``right``: are not above it). The search takes NaN for the largest number."""
    first, second = node.args[:2]
    values, boundaries = (first, second) if operation(node) == "aten.bucketize" else (second, first)
    if not is_tensor(values) or not is_tensor(boundaries) or "side" in node.kwargs or "sorter" in node.kwargs:
        return None
    assert isinstance(values, fx.Node)
    assert isinstance(boundaries, fx.Node)
    ends = _listed(lifter, boundaries)
    if ends is None or values.meta["val"].dtype != boundaries.meta["val"].dtype or _dtype(node) != torch.int64:
        return None
    numbers = [e.value for e in ends if isinstance(e, expr.Const | Int)]
    if any(a > b for a, b in pairwise(numbers)):
        return None
    x, beyond = lifter.element(values, index), argument(node, 3, "right", False)
    total: Expr = expr.integer(0)
    for end in ends:
        passed = expr.logical_not(expr.lt(x, end) if beyond else expr.le(x, end))
        total = expr.add(total, expr.cast(passed, torch.int64), torch.int64)
    return total


@position_rule("aten.scatter")
def _scatter(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """One number at a few places of each row."""
    source, dim, ids, value = node.args[:4]
    if is_tensor(value) or not is_tensor(ids) or "reduce" in node.kwargs or (isinstance(value, float) and value != value):
        return None
    assert isinstance(ids, fx.Node)
    d, shape = int(dim) % len(index), sizes(ids)  # type: ignore[arg-type]
    count = static(shape[d])
    if count is None:
        return None
    rows = [lifter.less(x, Int(n)) for k, (x, n) in enumerate(zip(index, shape, strict=True)) if k != d]
    places = [lifter.element(ids, (*index[:d], expr.integer(k), *index[d + 1 :])) for k in range(count)]
    written = expr.logical_and(*rows, expr.logical_or(*(expr.eq(index[d], place) for place in places)))
    new = expr.cast(lifter.element(value, ()), _dtype(node))
    return expr.where(written, new, lifter.element(source, index), _dtype(node))
