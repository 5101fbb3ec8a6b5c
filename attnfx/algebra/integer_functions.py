"""The functions in which torch writes integers known at run time, as those that an index expression may hold.

Dynamo records what a model does with sizes and positions: `max(0, length - window)`, `int(length / 2)`, shifts. Everything that has
an exact form in :data:`FUNCTIONS` is brought to it here; what has none keeps its function, and :func:`foreign` names it.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from torch.utils._sympy import functions
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from attnfx.algebra.integers import Ranges, extremum, floordiv, modulo

#: What an integer expression is made of besides symbols and integers.
FUNCTIONS = (sympy.Add, sympy.Mul, sympy.Pow, FloorDiv, Mod, PythonMod, Max, Min)
#: Integers up to here are exact in float64, and their quotients do not round to or across an integer.
EXACT = 2**53
#: What is taken for the largest value of a symbol without a known bound: positions are 32-bit numbers in kernels.
LARGEST = sympy.Integer(2**31)


def canonical(e: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """``e`` in :data:`FUNCTIONS` as far as it has an equal there for all values in range, and without maxima and minima that the
    ranges decide."""
    if not e.args:
        return e
    rule = _RULES.get(type(e).__name__)
    found = None if rule is None else rule(e, ranges)
    if found is not None:
        return found
    args = [canonical(a, ranges) if isinstance(a, sympy.Expr) else a for a in e.args]
    if isinstance(e, Max | Min):
        return extremum(type(e), args, ranges)
    if isinstance(e, FloorDiv) and ranges.nonnegative(args[1] - 1):  # what a size left out of a view must be
        return floordiv(args[0], args[1], ranges)
    return e if args == list(e.args) else e.func(*args)


def foreign(e: sympy.Expr) -> str:
    """The name of a function in ``e`` that no index expression may hold; empty where there is none."""
    if e.is_Symbol or e.is_Integer:
        return ""
    whole = not e.is_Pow or (e.args[1].is_Integer and e.args[1] > 0)
    if type(e) not in FUNCTIONS or not whole:
        return type(e).__name__
    return next(filter(None, map(foreign, e.args)), "")


def _divided(e: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    return floordiv(canonical(e.args[0], ranges), canonical(e.args[1], ranges), ranges)


def _indexed(e: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    base, below, size = (canonical(a, ranges) for a in e.args)
    return modulo(floordiv(base, below, ranges), size, ranges)


def _inside(e: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    return canonical(e.args[0], ranges)


def _power(e: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    base, exponent = (canonical(a, ranges) for a in e.args)
    return sympy.expand(base**exponent) if exponent.is_Integer and 0 <= int(exponent) <= 16 else None


def _rounded(direction: str) -> Callable[[sympy.Expr, Ranges], sympy.Expr | None]:
    """``floor``, ``ceil`` or ``trunc`` of a true division of integers, or of one integer."""

    def rule(e: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
        inner = e.args[0]
        quotient = isinstance(inner, functions.IntTrueDiv)
        if not quotient and not isinstance(inner, functions.ToFloat):
            return None
        a, b = (canonical(x, ranges) for x in (inner.args if quotient else (*inner.args, sympy.Integer(1))))
        known = Ranges(ranges.low, {**dict.fromkeys(a.free_symbols | b.free_symbols, LARGEST), **ranges.high})
        least, most = known.minimum(a), known.maximum(a)
        if not known.nonnegative(b - 1) or least is None or most is None or max(-least, most) >= EXACT:
            return None
        if direction == "trunc" and least < 0:
            return None
        return -floordiv(-a, b, ranges) if direction == "ceil" else floordiv(a, b, ranges)

    return rule


_RULES: dict[str, Callable[[sympy.Expr, Ranges], sympy.Expr | None]] = {
    "CleanDiv": _divided,
    "ModularIndexing": _indexed,
    "Identity": _inside,
    "PowByNatural": _power,
    "FloorToInt": _rounded("floor"),
    "CeilToInt": _rounded("ceil"),
    "TruncToInt": _rounded("trunc"),
}
