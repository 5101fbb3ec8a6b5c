"""Lifting rules of cumulative sums and differences along an axis."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.hulls import slacks
from attnfx.algebra.integers import Max, Min, Mod, PythonMod, extremum, floordiv
from attnfx.expr import Call, Const, Expr, Int
from attnfx.graphs.mirror import is_tensor, sizes
from attnfx.patterns.lift import Index, Lifter, rule
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.lift_values import _dtype, _unwrapped, exact_in


@rule("aten.diff")
@_unwrapped
def _diff(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Differences x[k] - x[k-1]; of first differences with an optional element prepended or appended."""
    source, order, dim = node.args[0], argument(node, 1, "n", 1), argument(node, 2, "dim", -1)
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    assert isinstance(source, fx.Node)
    if source.meta["val"].dtype.itemsize == 1 or lifter.mirror.requires_grad(node):
        return None
    d, dtype = int(dim) % len(index), _dtype(node)

    def at(x: Expr) -> Expr:
        return lifter.element(source, (*index[:d], x, *index[d + 1 :]))

    def steps(x: Expr, count: int) -> Expr:
        return at(x) if count == 0 else expr.sub(steps(x + 1, count - 1), steps(x, count - 1), dtype)

    if prepend is None and append is None:
        return steps(index[d], order) if 1 <= order <= 4 else None
    if order != 1 or (prepend is not None and append is not None):
        return None
    given = append if prepend is None else prepend
    if sizes(given)[d] != 1 or given.meta["val"].dtype != dtype:
        return None
    edge = lifter.element(given, (*index[:d], expr.integer(0), *index[d + 1 :]))
    if append is not None:
        last = Int(sizes(source)[d] - 1)
        return expr.where(lifter.less(index[d], last), steps(index[d], 1), expr.sub(edge, at(last), dtype), dtype)
    first, later = expr.sub(at(expr.integer(0)), edge, dtype), steps(index[d] - 1, 1)
    return first if later == first else expr.where(expr.eq(index[d], expr.integer(0)), first, later, dtype)


@rule("aten.cumsum")
@_unwrapped
def _cumsum(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """The running sum of whole numbers: of an affine sequence, or of two numbers that a bound tells apart."""
    source, d = node.args[0], int(argument(node, 1, "dim")) % max(len(index), 1)
    if not is_tensor(source) or not index or lifter.mirror.requires_grad(node):
        return None
    along = sympy.Dummy("along", integer=True, nonnegative=True)
    term = lifter.element(source, (*index[:d], Int(along), *index[d + 1 :]))
    found = running(lifter, term, along, index[d])
    if found is None or not _dtype(node).is_floating_point:
        return found
    return expr.cast(found, _dtype(node)) if exact_in(lifter, found, _dtype(node)) and _positive(term) else None


def _positive(term: Expr) -> bool:
    """Whether all summands have one sign, so that the sum of any run of them is no larger than the last one."""
    if isinstance(term, Call) and term.op == "where":
        on, off = (_number(x) for x in term.args[1:])
        return on is not None and off is not None and bool(on * off >= 0)
    return not isinstance(term, Int) or bool(term.value.is_Integer)


def running(lifter: Lifter, term: Expr, along: sympy.Symbol, last: Expr) -> Expr | None:
    """``sum(term for along in range(last + 1))``."""
    while isinstance(term, Call) and term.op == "cast" and isinstance(term.args[0], Int | Call):
        term = term.args[0]
    if not isinstance(last, Int):
        return None
    count = last.value + 1
    if (number := _number(term)) is not None:
        return Int(sympy.expand(number * count))
    if isinstance(term, Int):
        slope = sympy.expand(term.value.diff(along)) if term.value.is_polynomial(along) else along
        rest = sympy.expand(term.value - slope * along)
        if slope.has(along) or rest.has(along):
            return None
        return Int(sympy.expand(slope * floordiv(sympy.expand(count * (count - 1)), sympy.Integer(2)) + rest * count))
    if not term.dtype.is_floating_point and along not in expr.symbols(term):
        return expr.mul(expr.cast(term, torch.int64), Int(count), torch.int64)
    if not isinstance(term, Call):
        return None
    on: sympy.Expr | None = sympy.Integer(1)
    off: sympy.Expr | None = sympy.Integer(0)
    if term.op == "where" and term.dtype != torch.bool:
        on, off = map(_number, term.args[1:])
        term = term.args[0]
    inside = _kept(lifter, term, along, last.value)
    if inside is None or on is None or off is None:
        return None
    return Int(sympy.expand(on * inside + off * (count - inside)))


def _number(e: Expr) -> sympy.Expr | None:
    if isinstance(e, Int):
        return e.value if e.value.is_Integer else None
    whole = isinstance(e, Const) and float(e.value).is_integer()
    return sympy.Integer(int(e.value)) if whole else None  # type: ignore[attr-defined]


def _kept(lifter: Lifter, condition: Expr, along: sympy.Symbol, last: sympy.Expr) -> sympy.Expr | None:
    """How many of 0..last a condition keeps: bounds, one place, every c-th place, or all but those."""
    if not isinstance(condition, Call):
        return None
    if condition.op == "ne":
        others = _kept(lifter, Call("eq", condition.args, torch.bool), along, last)
        return None if others is None else last + 1 - others
    if condition.op == "eq" and len(found := slacks(condition)) == 2 and found[0].has(Mod, PythonMod):
        return _periodic(found[0], along, last)
    lows, highs = [sympy.Integer(0)], [last]
    for term in condition.args if condition.op == "and" else (condition,):
        ends = slacks(term)
        if not ends:
            return None
        for slack in ends:
            slope = slack.coeff(along)
            rest = sympy.expand(slack - slope * along)
            if rest.has(along) or slope not in (1, -1):
                return None
            (highs if slope == -1 else lows).append(rest if slope == -1 else sympy.expand(-rest))
    span = extremum(Min, highs, lifter.ranges) - extremum(Max, lows, lifter.ranges) + 1
    return extremum(Max, (sympy.Integer(0), sympy.expand(span)), lifter.ranges)


def _periodic(difference: sympy.Expr, along: sympy.Symbol, last: sympy.Expr) -> sympy.Expr | None:
    """How many of 0..last solve ``(along + r) mod c = d``."""
    digits = list(difference.atoms(Mod, PythonMod))
    if len(digits) != 1:
        return None
    base, by = digits[0].args
    slope, start = difference.coeff(digits[0]), sympy.expand(base - along)
    rest = sympy.expand(difference - slope * digits[0])
    wanted = sympy.expand(-rest * slope)
    plain = slope in (1, -1) and not rest.has(along) and not start.has(along) and by.is_Integer and by > 0
    if not plain or not wanted.is_Integer or not 0 <= wanted < by:
        return None
    return floordiv(last + start - wanted, by) - floordiv(start - wanted - 1, by)
