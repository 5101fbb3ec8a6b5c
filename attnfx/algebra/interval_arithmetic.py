"""Interval arithmetic (Moore 1966) on index expressions: both ends of an interval are expressions in the corners of a tile.

Every rule holds for all values: a float step is widened by more than any rounding, and what overflows, divides by what is not
positive or meets a NaN is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import sympy
import torch

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.expr import INDEX, TRUE, Call, Const, Expr, Int

#: The corners of a tile, by the index that they bound.
FIRST = {n: sympy.Symbol(f"{n}_first", integer=True, nonnegative=True) for n in "ij"}
LAST = {n: sympy.Symbol(f"{n}_last", integer=True, nonnegative=True) for n in "ij"}
#: Each step in floating point is widened by this part of it, and by as much again absolutely where the function is approximated.
SLACK = 2.0**-16
TINY = 1e-30
_LARGEST = 3e38
#: Integers that were loaded are added and multiplied exactly below these.
_SUMMED, _MULTIPLIED = 2**61, 2**31
_RISING = frozenset(("exp", "exp2", "log", "sqrt", "tanh", "sigmoid"))


@dataclass(frozen=True)
class Interval:
    """``low <= value <= high`` where ``known``; else nothing is said."""

    low: Expr
    high: Expr
    known: Expr = TRUE


def of_positions(e: sympy.Expr) -> Interval | None:
    """The interval of an integer formula of positions, which is exact in every step."""
    if e.free_symbols.isdisjoint((INDEX["i"], INDEX["j"])):
        return Interval(Int(e), Int(e))
    for name in "ij":
        if e == INDEX[name]:
            return Interval(Int(FIRST[name]), Int(LAST[name]))
    if e.is_Pow and e.args[1].is_Integer and e.args[1] > 0:
        base = of_positions(e.args[0])
        return None if base is None else _power(base, int(e.args[1]))
    found = [of_positions(a) for a in e.args]
    args = [a for a in found if a is not None]
    if len(args) < len(found):
        return None
    if e.is_Add:
        return reduce(_sum, args)
    if e.is_Mul:
        return reduce(_product, args)
    if isinstance(e, Max | Min):
        return reduce(_larger if isinstance(e, Max) else _smaller, args)
    if isinstance(e, FloorDiv):
        return _quotient(*args)
    return _remainder(*args) if isinstance(e, Mod | PythonMod) else None


def of_integers(e: Call, args: list[Interval]) -> Interval | None:
    """An operation on integers some of which were loaded: in the range of its dtype, or not known."""
    rules: dict[str, Callable[..., Interval]] = {
        "add": _sum, "sub": lambda a, b: _sum(a, _negated(b)), "mul": _product, "min": _smaller, "max": _larger, "abs": _magnitude,
        "neg": _negated, "floordiv": _quotient, "mod": _remainder,
    }  # fmt: skip
    if e.op not in rules:
        return None
    limit = expr.integer(_MULTIPLIED if e.op == "mul" else _SUMMED)
    args = [fits(a, e.dtype) for a in args]
    small = [expr.lt(x, limit) for a in args for x in (a.high, _minus(a.low))]
    square = e.op == "mul" and e.args[0] == e.args[1]
    found = _power(args[0], 2) if square else rules[e.op](*args)
    return fits(Interval(found.low, found.high, every(found.known, *small)), e.dtype)


def fits(x: Interval, dtype: torch.dtype) -> Interval:
    """``x``, not known where it overflows ``dtype``."""
    if dtype in (torch.int64, torch.bool) or dtype.is_floating_point:
        return x
    info = torch.iinfo(dtype)
    inside = every(x.known, expr.le(expr.integer(info.min), x.low), expr.le(x.high, expr.integer(info.max)))
    return Interval(x.low, x.high, inside)


def _sum(a: Interval, b: Interval) -> Interval:
    return Interval(_add(a.low, b.low), _add(a.high, b.high), every(a.known, b.known))


def _negated(a: Interval) -> Interval:
    return Interval(_minus(a.high), _minus(a.low), a.known)


def _magnitude(a: Interval) -> Interval:
    dtype = a.low.dtype
    low = expr.maximum(expr.maximum(a.low, _minus(a.high), dtype), _zero(dtype), dtype)
    return Interval(low, expr.maximum(a.high, _minus(a.low), dtype), a.known)


def _larger(a: Interval, b: Interval) -> Interval:
    dtype = a.low.dtype
    return Interval(expr.maximum(a.low, b.low, dtype), expr.maximum(a.high, b.high, dtype), every(a.known, b.known))


def _smaller(a: Interval, b: Interval) -> Interval:
    dtype = a.low.dtype
    return Interval(expr.minimum(a.low, b.low, dtype), expr.minimum(a.high, b.high, dtype), every(a.known, b.known))


def _product(a: Interval, b: Interval) -> Interval:
    known = every(a.known, b.known)
    for x, y in ((a, b), (b, a)):
        if x.low == x.high and isinstance(x.low, Int):
            if x.low.value.is_nonnegative:
                return Interval(_times(x.low, y.low), _times(x.low, y.high), known)
            if x.low.value.is_nonpositive:
                return Interval(_times(x.low, y.high), _times(x.low, y.low), known)
    return _of_corners([_times(x, y) for x in _ends(a) for y in _ends(b)], known)


def _power(a: Interval, exponent: int) -> Interval:
    size = a if exponent % 2 else _magnitude(a)
    low, high = (reduce(_times, [x] * exponent) for x in (size.low, size.high))
    return Interval(low, high, a.known)


def _quotient(a: Interval, b: Interval) -> Interval:
    known = every(a.known, b.known, expr.lt(expr.integer(0), b.low))
    divisors = [_positive(x) for x in _ends(b)]
    if len(divisors) == 1:
        return Interval(expr.floordiv(a.low, divisors[0]), expr.floordiv(a.high, divisors[0]), known)
    return _of_corners([expr.floordiv(x, y, torch.int64) for x in _ends(a) for y in divisors], known)


def _remainder(a: Interval, b: Interval) -> Interval:
    """Where a run of positions passes a multiple of the divisor, it may leave any remainder."""
    known = every(a.known, b.known, expr.lt(expr.integer(0), b.low))
    most = expr.sub(_positive(b.high), expr.integer(1))
    if len(_ends(b)) > 1:
        return Interval(expr.integer(0), most, known)
    divisor = _positive(b.low)
    one_round = expr.eq(expr.floordiv(a.low, divisor), expr.floordiv(a.high, divisor))
    low = expr.where(one_round, expr.mod(a.low, divisor), expr.integer(0), torch.int64)
    return Interval(low, expr.where(one_round, expr.mod(a.high, divisor), most, torch.int64), known)


def of_floats(e: Call, args: list[Interval]) -> Interval | None:
    """An operation in floating point, widened."""
    args = [Interval(expr.cast(a.low, e.dtype), expr.cast(a.high, e.dtype), a.known) for a in args]
    if e.op in ("min", "max", "neg", "abs"):
        rules: dict[str, Callable[..., Interval]] = {"min": _smaller, "max": _larger, "neg": _negated, "abs": _magnitude}
        return rules[e.op](*args)
    wide = torch.float64 if e.dtype == torch.float64 else torch.float32
    known = every(*(a.known for a in args), *(within(x, _LARGEST) for a in args for x in _ends(a)))
    a, b = args[0], args[-1]
    if e.op == "floor":
        return Interval(expr.call("floor", a.low, dtype=e.dtype), expr.call("floor", a.high, dtype=e.dtype), known)
    if e.op in _RISING:
        if e.op in ("log", "sqrt"):
            known = every(known, expr.lt(expr.constant(0.0, wide), a.low))
        ends = [expr.call(e.op, expr.cast(x, wide), dtype=wide) for x in (a.low, a.high)]
        return widened(ends[0], ends[1], e.dtype, known, SLACK)
    if e.op not in ("add", "sub", "mul", "div"):
        return None
    if e.op == "div":
        known = every(known, expr.logical_or(expr.lt(expr.constant(0.0, wide), b.low), expr.lt(b.high, expr.constant(0.0, wide))))
    if e.op in ("add", "sub"):
        other = b if e.op == "add" else _negated(b)
        pairs = ((a.low, other.low), (a.high, other.high))
        low, high = (expr.call("add", expr.cast(x, wide), expr.cast(y, wide), dtype=wide) for x, y in pairs)
        return widened(low, high, e.dtype, known)
    if e.op == "mul" and e.args[0] == e.args[1]:
        size = _magnitude(a)
        low, high = (expr.call("mul", x, x, dtype=wide) for x in (expr.cast(size.low, wide), expr.cast(size.high, wide)))
        return widened(low, high, e.dtype, known)
    corners = [expr.call(e.op, expr.cast(x, wide), expr.cast(y, wide), dtype=wide) for x in _ends(a) for y in _ends(b)]
    found = _of_corners(corners, known)
    return widened(found.low, found.high, e.dtype, known)


def widened(low: Expr, high: Expr, dtype: torch.dtype, known: Expr, absolute: float = TINY) -> Interval:
    """The interval, a little wider on either side, and then rounded to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def moved(x: Expr, op: str) -> Expr:
        size = expr.mul(expr.call("abs", x, dtype=wide), expr.constant(SLACK, wide), wide)
        return expr.cast(expr.call(op, x, expr.add(size, expr.constant(absolute, wide), wide), dtype=wide), dtype)

    return Interval(moved(low, "sub"), moved(high, "add"), every(known, *(within(x, _LARGEST) for x in (low, high))))


def _of_corners(corners: list[Expr], known: Expr) -> Interval:
    dtype = corners[0].dtype
    low = reduce(lambda x, y: expr.minimum(x, y, dtype), corners)
    return Interval(low, reduce(lambda x, y: expr.maximum(x, y, dtype), corners), known)


def _ends(a: Interval) -> list[Expr]:
    return [a.low] if a.low == a.high else [a.low, a.high]


def _positive(x: Expr) -> Expr:
    """``x``, or 1 where it is not positive: what is divided by it is not known there."""
    return x if isinstance(x, Int) and x.value.is_positive else expr.maximum(x, expr.integer(1), torch.int64)


def within(x: Expr, limit: float) -> Expr:
    """Whether a float is no larger than ``limit`` in magnitude; false of NaN."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return expr.le(expr.cast(expr.call("abs", x, dtype=x.dtype), wide), expr.constant(limit, wide))


def every(*conditions: Expr) -> Expr:
    return expr.logical_and(*conditions)


def _add(a: Expr, b: Expr) -> Expr:
    return expr.add(a, b, _kind(a))


def _times(a: Expr, b: Expr) -> Expr:
    return expr.mul(a, b, _kind(a))


def _minus(a: Expr) -> Expr:
    return expr.constant(-a.value, a.dtype) if isinstance(a, Const) else -a


def _zero(dtype: torch.dtype) -> Expr:
    return expr.constant(0, dtype)


def _kind(a: Expr) -> torch.dtype:
    return a.dtype if a.dtype.is_floating_point else torch.int64
