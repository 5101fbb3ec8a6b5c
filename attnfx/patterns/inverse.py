"""Inverses of views: where an element of a tensor lies in a view of it, and for which elements the view has a place at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import as_sympy, sizes
from attnfx.patterns.lift import Index, Lifter, operation
from attnfx.patterns.lift_moves import argument, integer_of
from attnfx.patterns.lift_reshapes import reshaped

#: ``inside, index``: a predicate, and the index into the view (meaningful where the predicate holds).
Place = tuple[Expr, Index]
Inverse = Callable[[Lifter, fx.Node, fx.Node, Index], Place | None]
_INVERSES: dict[str, Inverse] = {}


def inverse(*operations: str) -> Callable[[Inverse], Inverse]:
    def register(function: Inverse) -> Inverse:
        _INVERSES.update(dict.fromkeys(operations, function))
        return function

    return register


def placed(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    """Where element ``index`` of ``source`` lies in its view ``view``; None where the view cannot be inverted."""
    apply = _INVERSES.get(operation(view))
    return None if apply is None else apply(lifter, view, source, index)


def equal(lifter: Lifter, a: Expr, b: Expr) -> Expr:
    """``a == b``, decided where the ranges decide it."""
    if isinstance(a, Int) and isinstance(b, Int):
        ahead, behind = a.value - b.value, b.value - a.value
        if lifter.ranges.nonnegative(ahead - 1) or lifter.ranges.nonnegative(behind - 1):
            return expr.FALSE
        if lifter.ranges.nonnegative(ahead) and lifter.ranges.nonnegative(behind):
            return expr.TRUE
    return expr.eq(a, b)


def among(lifter: Lifter, at: Expr, begin: sympy.Expr, step: sympy.Expr, count: sympy.Expr, size: sympy.Expr) -> tuple[Expr, Expr]:
    """Whether ``at`` (below ``size``) is ``begin + step * k`` for some k below ``count``, and that k; ``step`` is positive."""
    terms = [lifter.less(Int(begin - 1), at)]
    if not lifter.ranges.nonnegative(begin + step * count - size):
        terms.append(lifter.less(at, Int(begin + step * (count - 1) + 1)))
    offset = at - Int(begin)
    if step != 1:
        terms.append(equal(lifter, lifter.modulo(offset, step), expr.integer(0)))
    return expr.logical_and(*terms), lifter.floordiv(offset, step)


@inverse("aten.alias", "aten.detach", "aten.detach_", "aten.contiguous", "aten.lift_fresh", "aten.to", "aten.type_as")
def _same(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    return (expr.TRUE, index) if sizes(view) == sizes(source) else None


@inverse("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.view_as")
def _reshape(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    if view.meta["val"].dtype != source.meta["val"].dtype:
        return None
    return expr.TRUE, reshaped(lifter, sizes(view), sizes(source), index)


@inverse("aten.permute")
def _permute(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    return expr.TRUE, tuple(index[int(d) % len(index)] for d in argument(view, 1, "dims"))


@inverse("aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.transpose_", "aten.swapaxes_", "aten.swapdims_")
def _transpose(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    moved = list(index)
    a, b = (int(d) % len(index) for d in view.args[1:3])  # type: ignore[arg-type]
    moved[a], moved[b] = moved[b], moved[a]
    return expr.TRUE, tuple(moved)


@inverse("aten.t", "aten.mT", "aten.numpy_T", "aten.t_")
def _flip_last(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    if operation(view) == "aten.numpy_T":
        return expr.TRUE, index[::-1]
    return expr.TRUE, (*index[:-2], *index[:-3:-1]) if len(index) > 1 else index


@inverse("aten.unsqueeze", "aten.unsqueeze_")
def _unsqueeze(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    d = int(argument(view, 1, "dim")) % (len(index) + 1)
    return expr.TRUE, (*index[:d], expr.integer(0), *index[d:])


@inverse("aten.squeeze", "aten.squeeze_")
def _squeeze(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    dims = argument(view, 1, "dim")
    asked = range(len(index)) if dims is None else [int(d) % len(index) for d in ([dims] if isinstance(dims, int) else dims)]
    shape = sizes(source)
    return expr.TRUE, tuple(x for d, x in enumerate(index) if not (d in asked and shape[d] == 1))


@inverse("aten.expand", "aten.expand_as", "aten.broadcast_to")
def _expand(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    """Only where nothing is repeated: new axes of size one."""
    lead = len(sizes(view)) - len(index)
    wide = sizes(view)[lead:] != sizes(source) or any(n != 1 for n in sizes(view)[:lead])
    return None if wide else (expr.TRUE, (*[expr.integer(0)] * lead, *index))


@inverse("aten.select")
def _select(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    d = int(argument(view, 1, "dim")) % len(index)
    at = integer_of(argument(view, 2, "index"))
    at = at + sizes(source)[d] if at.is_negative else at
    return equal(lifter, index[d], Int(at)), (*index[:d], *index[d + 1 :])


@inverse("aten.slice")
def _slice(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    d = int(argument(view, 1, "dim", 0)) % len(index)
    start = argument(view, 2, "start")
    begin = integer_of(start) if start is not None else sympy.Integer(0)
    if begin.is_negative:
        begin = begin + sizes(source)[d]
    step = integer_of(argument(view, 4, "step", 1))
    return _part(lifter, view, source, index, d, begin, step)


@inverse("aten.narrow")
def _narrow(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    d = int(argument(view, 1, "dim")) % len(index)
    begin = integer_of(argument(view, 2, "start"))
    return _part(lifter, view, source, index, d, begin + sizes(source)[d] if begin.is_negative else begin, sympy.Integer(1))


def _part(
    lifter: Lifter, view: fx.Node, source: fx.Node, index: Index, d: int, begin: sympy.Expr, step: sympy.Expr
) -> Place | None:
    if not lifter.ranges.nonnegative(begin) or not step.is_positive:
        return None
    inside, at = among(lifter, index[d], begin, step, sizes(view)[d], sizes(source)[d])
    return inside, (*index[:d], at, *index[d + 1 :])


@inverse("_operator.getitem")
def _unpack(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    """One of the results of split, chunk or unbind."""
    maker, which = view.args
    assert isinstance(maker, fx.Node)
    assert isinstance(which, int)
    name = str(getattr(maker.target, "overloadpacket", ""))
    if name not in ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split"):
        return None
    d = int(argument(maker, 1 if name == "aten.unbind" else 2, "dim", 0)) % len(index)
    if name == "aten.unbind":
        return equal(lifter, index[d], expr.integer(which)), (*index[:d], *index[d + 1 :])
    before: Sequence[sympy.Expr] = [as_sympy(t.shape[d]) for t in maker.meta["val"][:which]]
    return _part(lifter, view, source, index, d, sum(before, sympy.Integer(0)), sympy.Integer(1))


@inverse("aten.diagonal")
def _diagonal(lifter: Lifter, view: fx.Node, source: fx.Node, index: Index) -> Place | None:
    offset = integer_of(argument(view, 1, "offset", 0))
    a = int(argument(view, 2, "dim1", 0)) % len(index)
    b = int(argument(view, 3, "dim2", 1)) % len(index)
    if not offset.is_Integer:
        return None
    along = index[a] if offset >= 0 else index[b]
    rest = tuple(x for d, x in enumerate(index) if d not in (a, b))
    return equal(lifter, index[b] - index[a], Int(offset)), (*rest, along)
