"""Lifting rules of operations that write: fill, copy, comparisons in place, and writes at indices, in place and out of place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import is_tensor, sizes
from attnfx.patterns.inverse import among, equal
from attnfx.patterns.lift import Index, Lifter, operation, rule
from attnfx.patterns.lift_moves import argument, integer_of
from attnfx.patterns.lift_values import COMPARISONS, _across, _compare, _converted, _dtype


def _number(lifter: Lifter, value: Any, index: Index, dtype: torch.dtype) -> Expr | None:
    """An operand of a write, a number or a tensor that broadcasts to ``index``, in the dtype that is written."""
    if isinstance(value, float) and value != value:
        return None
    return _converted(lifter, lifter.broadcast(value, index), dtype)


def _chosen(inside: Expr, new: Expr | None, old: Expr, dtype: torch.dtype) -> Expr | None:
    from attnfx.patterns.versions import merged

    if inside == expr.FALSE:
        return old
    return None if new is None else new if inside == expr.TRUE else merged(inside, new, old, dtype)


@rule("aten.fill_", "aten.fill")
def _fill(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return _number(lifter, node.args[1], index, _dtype(node))


@rule("aten.zero_", "aten.zero")
def _zero(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return expr.constant(0, _dtype(node))


@rule("aten.copy_", "aten.copy")
def _copy(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[1]
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    if len(shape) > len(index):
        return None
    at = index[len(index) - len(shape) :]
    picked = tuple(expr.integer(0) if n == 1 else x for n, x in zip(shape, at, strict=True))
    if source.meta["val"].device != node.meta["val"].device:
        return _across(lifter, node, source, picked)
    return _converted(lifter, lifter.element(source, picked), _dtype(node))


@rule("aten.fill_diagonal_")
def _fill_diagonal(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if len(index) != 2 or argument(node, 2, "wrap", False):
        return None
    value = _number(lifter, node.args[1], (), _dtype(node))
    return _chosen(equal(lifter, *index), value, lifter.element(node.args[0], index), _dtype(node))


def _compared(name: str) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        found = _compare(name)(lifter, node, index)
        return None if found is None else expr.cast(found, _dtype(node))

    return apply


for _name, _other in COMPARISONS:
    rule(f"aten.{_name}_", f"aten.{_other}_")(_compared(_name))


@rule("aten.__ixor__", "aten.logical_xor_", "aten.bitwise_xor_")
def _xor(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if _dtype(node) != torch.bool:
        return None
    a, b = (expr.cast(lifter.broadcast(x, index), torch.bool) for x in node.args[:2])
    return expr.call("xor", a, b, dtype=torch.bool)


# Writes at indices ----------------------------------------------------------------------------------------------------


def _reached(lifter: Lifter, ids: Any, at: Expr, size: sympy.Expr) -> tuple[Expr, Expr] | None:
    """Whether the index tensor ``ids`` (rank one, evenly spaced) holds ``at``, and at which place of it."""
    if not is_tensor(ids) or ids.meta["val"].dtype not in (torch.int64, torch.int32) or len(sizes(ids)) > 1:
        return None
    count = sizes(ids)[0] if len(sizes(ids)) else sympy.Integer(1)
    t = sympy.Dummy("t", integer=True, nonnegative=True)
    found = lifter.element(ids, (Int(t),) if len(sizes(ids)) else ())
    if not isinstance(found, Int):
        return None
    begin, step = found.value.subs(t, 0), sympy.expand(found.value.diff(t))
    if count == 1:
        step = sympy.Integer(1)
    if (count != 1 and sympy.expand(begin + step * t - found.value) != 0) or not (step.is_Integer and step > 0):
        return None
    if not lifter.ranges.nonnegative(begin):
        if not lifter.ranges.nonnegative(-begin - 1 - step * (count - 1)):
            return None
        begin = begin + size
    return among(lifter, at, begin, step, count, size)


@rule("aten.index_fill_", "aten.index_fill")
def _index_fill(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, dim, ids, value = node.args[:4]
    d = int(dim) % len(index)  # type: ignore[arg-type]
    found = _reached(lifter, ids, index[d], sizes(node)[d])
    if found is None:
        return None
    return _chosen(found[0], _number(lifter, value, (), _dtype(node)), lifter.element(source, index), _dtype(node))


@rule("aten.index_copy_", "aten.index_copy")
def _index_copy(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, dim, ids, new = node.args[:4]
    d = int(dim) % len(index)  # type: ignore[arg-type]
    found = _reached(lifter, ids, index[d], sizes(node)[d])
    if found is None:
        return None
    written = lifter.element(new, (*index[:d], found[1], *index[d + 1 :])) if found[0] != expr.FALSE else None
    return _chosen(found[0], written, lifter.element(source, index), _dtype(node))


@rule("aten.index_put_", "aten.index_put")
def _index_put(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """One index tensor: a mask with a number to write, or evenly spaced places."""
    source, given, values = node.args[:3]
    picks = [(d, ids) for d, ids in enumerate(given) if ids is not None]  # type: ignore[arg-type]
    if len(picks) != 1 or argument(node, 3, "accumulate", False) or not is_tensor(values):
        return None
    d, ids = picks[0]
    assert isinstance(values, fx.Node)
    shape = sizes(values)
    if ids.meta["val"].dtype == torch.bool:
        if any(n != 1 for n in shape) or d != 0:
            return None
        inside: Expr = lifter.element(ids, index[: len(sizes(ids))])
        place: Index = ()
    else:
        found = _reached(lifter, ids, index[d], sizes(node)[d])
        if found is None:
            return None
        inside, place = found[0], (*index[:d], *([found[1]] if len(sizes(ids)) else []), *index[d + 1 :])
        if len(shape) > len(place):
            return None
    at = place[len(place) - len(shape) :] if place else (expr.integer(0),) * len(shape)
    picked = tuple(expr.integer(0) if n == 1 else x for n, x in zip(shape, at, strict=True))
    written = _converted(lifter, lifter.element(values, picked), _dtype(node)) if inside != expr.FALSE else None
    return _chosen(inside, written, lifter.element(source, index), _dtype(node))


@rule("aten.slice_scatter", "aten.select_scatter")
def _scatter_part(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """``source`` with a slice of it, or one place of an axis, taken from another tensor."""
    source, new = node.args[:2]
    selected = operation(node) == "aten.select_scatter"
    d = int(argument(node, 2, "dim", 0)) % len(index)
    start = argument(node, 3, "index" if selected else "start")
    begin = integer_of(start) if start is not None else sympy.Integer(0)
    size = sizes(node)[d]
    begin = begin + size if begin.is_negative else begin
    step = sympy.Integer(1) if selected else integer_of(argument(node, 5, "step", 1))
    if not lifter.ranges.nonnegative(begin) or not step.is_positive:
        return None
    inside, at = among(lifter, index[d], begin, step, sympy.Integer(1) if selected else sizes(new)[d], size)  # type: ignore[arg-type]
    place = (*index[:d], *([] if selected else [at]), *index[d + 1 :])
    written = lifter.element(new, place) if inside != expr.FALSE else None
    return _chosen(inside, written, lifter.element(source, index), _dtype(node))
