"""Lifting rules of operations that put elements elsewhere: rolls, mirrored and negative padding, diagonals, grids, joins."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import sizes
from attnfx.patterns.lift import Index, Lifter, operation, position_rule, rule
from attnfx.patterns.lift_gathers import wrapped
from attnfx.patterns.lift_moves import argument, integer_of
from attnfx.patterns.lift_reshapes import reshaped
from attnfx.patterns.lift_values import _dtype


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


@position_rule("aten.roll")
def _roll(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, shifts, dims = node.args[0], _listed(node.args[1]), _listed(argument(node, 2, "dims", ()))
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    if dims in ([], [()]):
        count = sympy.Mul(*shape)
        (flat,) = reshaped(lifter, [count], shape, index)
        moved = _back(lifter, flat, integer_of(shifts[0]), count)
        return lifter.element(source, reshaped(lifter, shape, [count], (moved,)))
    at = list(index)
    for shift, dim in zip(shifts, dims, strict=True):
        d = int(dim) % len(index)  # type: ignore[call-overload]
        at[d] = _back(lifter, at[d], integer_of(shift), shape[d])
    return lifter.element(source, tuple(at))


def _back(lifter: Lifter, at: Expr, shift: sympy.Expr, size: sympy.Expr) -> Expr:
    return lifter.modulo(at - Int(shift), size)


@rule("aten.pad")
def _pad(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Padding in every mode; what is padded by a negative amount is cut off."""
    from attnfx.patterns.lift_gathers import _pad as constant

    mode, amounts = argument(node, 2, "mode", "constant"), [integer_of(x) for x in argument(node, 1, "pad")]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if mode == "constant" and not any(a.is_negative for a in amounts):
        return constant(lifter, node, index)
    if lifter.mirror.requires_grad(node) or (mode == "constant" and not all(a.is_Integer for a in amounts)):
        return None
    shape, at = sizes(source), list(index)
    inside: Expr = expr.TRUE
    for k in range(len(amounts) // 2):
        d = len(shape) - 1 - k
        x, last = index[d] - Int(amounts[2 * k]), Int(shape[d] - 1)
        if mode == "constant":
            inside = expr.logical_and(inside, *_within(lifter, x, shape[d]))
        elif mode == "circular":
            x = lifter.modulo(x, shape[d])
        else:
            low, high = ((expr.integer(0), last)) if mode == "replicate" else (expr.integer(0) - x, last + last - x)
            x = expr.where(lifter.less(x, expr.integer(0)), low, expr.where(lifter.less(last, x), high, x))
        at[d] = x
    found = lifter.element(source, tuple(at))
    return expr.where(inside, found, expr.constant(argument(node, 3, "value") or 0, _dtype(node)), _dtype(node))


@position_rule("aten.take")
def _take(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    count = sympy.Mul(*shape)
    at = wrapped(lifter, lifter.element(node.args[1], index), count)
    return lifter.element(source, reshaped(lifter, shape, [count], (at,)))


@position_rule("aten.take_along_dim")
def _take_along(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, ids, dim = node.args[0], node.args[1], argument(node, 2, "dim")
    assert isinstance(source, fx.Node)
    if dim is None:
        return None
    d = int(dim) % len(index)
    chosen = lifter.broadcast(ids, index)
    at = [expr.integer(0) if n == 1 else x for n, x in zip(sizes(source), index, strict=True)]
    at[d] = wrapped(lifter, chosen, sizes(source)[d])
    return lifter.element(source, tuple(at))


@position_rule("aten.diagonal")
def _diagonal(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    offset = integer_of(argument(node, 1, "offset", 0))
    rank = len(index) + 1
    a, b = (int(argument(node, p, name, p - 2)) % rank for p, name in ((2, "dim1"), (3, "dim2")))
    if not offset.is_Integer:
        return None
    rest = iter(index[:-1])
    row, column = (index[-1] - Int(sympy.Min(offset, 0)), index[-1] + Int(sympy.Max(offset, 0)))
    at = [row if d == a else column if d == b else next(rest) for d in range(rank)]
    return lifter.element(node.args[0], tuple(at))


@position_rule("aten.diag_embed", "aten.diag")
def _diag_embed(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if any(len(node.args) > k for k in (1, 2, 3)) or node.kwargs or len(sizes(source)) != len(index) - 1:
        return None
    row, column = index[-2:]
    return expr.where(expr.eq(row, column), lifter.element(source, index[:-1]), expr.constant(0, _dtype(node)), _dtype(node))


@position_rule("aten.fliplr", "aten.flipud")
def _flip(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    d = 1 if operation(node) == "aten.fliplr" else 0
    return lifter.element(node.args[0], (*index[:d], Int(sizes(node)[d] - 1) - index[d], *index[d + 1 :]))


@position_rule("aten.movedim", "aten.moveaxis")
def _movedim(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    rank = len(index)
    sources, ends = ([int(d) % rank for d in _listed(node.args[k])] for k in (1, 2))  # type: ignore[call-overload]
    left = iter(d for d in range(rank) if d not in sources)
    order = [sources[ends.index(d)] if d in ends else next(left) for d in range(rank)]
    return lifter.element(node.args[0], tuple(index[order.index(d)] for d in range(rank)))


@position_rule("aten.hstack", "aten.vstack", "aten.row_stack")
def _joined(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Of tensors of equal rank, at least two for rows."""
    pieces: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    shapes = [sizes(p) for p in pieces]
    if any(len(s) != len(index) for s in shapes):
        return None
    d = 1 if operation(node) == "aten.hstack" and len(index) > 1 else 0
    start, found = sympy.Add(*(s[d] for s in shapes)), None
    for piece, shape in reversed(list(zip(pieces, shapes, strict=True))):
        end, start = start, start - shape[d]
        inside = lifter.less(index[d], Int(end))
        if inside == expr.FALSE:
            continue
        value = lifter.element(piece, (*index[:d], index[d] - Int(start), *index[d + 1 :]))
        found = value if found is None else expr.where(inside, value, found, _dtype(node))
    return found


def grid(lifter: Lifter, source: fx.Node, which: int, index: Index) -> Expr | None:
    """Result ``which`` of a meshgrid: its axis alone."""
    axes = source.args[0]
    assert isinstance(axes, list | tuple)
    swapped = argument(source, 1, "indexing", "ij") == "xy" and len(axes) > 1 and which < 2
    axis = axes[which]
    assert isinstance(axis, fx.Node)
    return lifter.element(axis, (index[1 - which if swapped else which],) if sizes(axis) else ())


@position_rule("aten.outer", "aten.ger")
def _outer(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    a, b = (lifter.element(x, (index[k],)) for k, x in enumerate(node.args[:2]))
    return expr.mul(expr.cast(a, _dtype(node)), expr.cast(b, _dtype(node)), _dtype(node))


@position_rule("aten.block_diag")
def _blocks(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Matrices along the diagonal, zero elsewhere."""
    pieces: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    if any(len(sizes(p)) != 2 for p in pieces):
        return None
    found = expr.constant(0, _dtype(node))
    row = column = sympy.Integer(0)
    for piece in pieces:
        high, wide = sizes(piece)
        at = (index[0] - Int(row), index[1] - Int(column))
        inside = expr.logical_and(*_within(lifter, at[0], high), *_within(lifter, at[1], wide))
        if inside != expr.FALSE:
            found = expr.where(inside, expr.cast(lifter.element(piece, at), _dtype(node)), found, _dtype(node))
        row, column = row + high, column + wide
    return found


def _within(lifter: Lifter, at: Expr, size: sympy.Expr) -> tuple[Expr, Expr]:
    return lifter.less(expr.integer(-1), at), lifter.less(at, Int(size))
