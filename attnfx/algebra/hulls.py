"""Where a predicate can hold at all: for each query an interval of keys that encloses all it keeps, and the other way round.

Ends are functions of the given position that never decrease, so that the first and the last position of a run bound the run.
``i // c == j // c`` encloses ``i // c * c <= j <= i // c * c + c - 1``, and ``j <= i or j < p`` encloses ``j <= max(i, p - 1)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Ranges, extremum
from attnfx.expr import INDEX, Call, Expr, Int

_POSITIONS = frozenset(INDEX.values())


@dataclass(frozen=True)
class Hull:
    """``low <= wanted <= high``, both inclusive functions of the given position; None where absent."""

    low: sympy.Expr | None = None
    high: sympy.Expr | None = None


ANYWHERE = Hull()


def hull(e: Expr, given: sympy.Symbol, wanted: sympy.Symbol, ranges: Ranges) -> Hull | None:
    """The interval of ``wanted`` outside of which ``e`` is false; None where ``e`` is always false."""
    if e == expr.FALSE:
        return None
    if not isinstance(e, Call):
        return ANYWHERE
    if e.op in ("and", "or"):
        if e.op == "or" and (until := _free_until(e, given)) is not None:
            term, last = until
            rest = expr.logical_or(*(a for a in e.args if a != term))
            return _begun_after(last, given, hull(rest, given, wanted, ranges), ranges)
        parts = [hull(a, given, wanted, ranges) for a in e.args]
        if e.op == "and":
            return None if None in parts else _met((p for p in parts if p is not None), ranges)
        return _joined([p for p in parts if p is not None], ranges)
    return _met((_of_slack(s, given, wanted) for s in slacks(e)), ranges)


def _free_until(e: Call, given: sympy.Symbol) -> tuple[Expr, sympy.Expr] | None:
    """A term of the disjunction ``e`` that says ``given <= c`` and nothing else, and its ``c``."""
    for a in e.args:
        parts = slacks(a)
        if len(parts) == 1 and parts[0].coeff(given) == -1:
            last = sympy.expand(parts[0] + given)
            if not last.free_symbols & _POSITIONS:
                return a, last
    return None


def _begun_after(last: sympy.Expr, given: sympy.Symbol, rest: Hull | None, ranges: Ranges) -> Hull:
    """The hull of ``given <= last or rest``: anything up to ``last``, and no less than what the rest begins with after it."""
    if rest is None or rest.low is None:
        return ANYWHERE
    zero, one = sympy.Integer(0), sympy.Integer(1)
    after = extremum(Min, [one, extremum(Max, [zero, given - last], ranges)], ranges)  # 0 up to ``last``, then 1
    return Hull(low=extremum(Max, [zero, rest.low], ranges) * after)


def slacks(e: Expr) -> tuple[sympy.Expr, ...]:
    """Integers that are all >= 0 just where the comparison ``e`` holds; none where it is no comparison of integers."""
    if not isinstance(e, Call) or e.op not in ("le", "eq"):
        return ()
    a, b = e.args
    if not (isinstance(a, Int) and isinstance(b, Int)):
        return ()
    slack = sympy.expand(b.value - a.value)
    return (slack,) if e.op == "le" else (slack, sympy.expand(-slack))


def _met(parts: Iterable[Hull], ranges: Ranges) -> Hull:
    found = list(parts)
    lows, highs = [p.low for p in found if p.low is not None], [p.high for p in found if p.high is not None]
    low = extremum(Max, lows, ranges) if lows else None
    return Hull(low, extremum(Min, highs, ranges) if highs else None)


def _joined(parts: list[Hull], ranges: Ranges) -> Hull | None:
    if not parts:
        return None
    lows, highs = [p.low for p in parts if p.low is not None], [p.high for p in parts if p.high is not None]
    low = extremum(Min, lows, ranges) if len(lows) == len(parts) else None
    return Hull(low, extremum(Max, highs, ranges) if len(highs) == len(parts) else None)


def _of_slack(slack: sympy.Expr, given: sympy.Symbol, wanted: sympy.Symbol) -> Hull:
    """``slack >= 0`` solved for ``wanted``, which it holds once, or once in a quotient."""
    quotients = [q for q in slack.atoms(FloorDiv) if q.has(wanted)]
    if any(f.has(wanted) for f in slack.atoms(Max, Min)) or len(quotients) > 1:
        return ANYWHERE
    unknown = quotients[0] if quotients else wanted
    slope = slack.coeff(unknown)
    rest = sympy.expand(slack - slope * unknown)
    if slope not in (1, -1) or rest.has(wanted):
        return ANYWHERE
    end = rest if slope == -1 else sympy.expand(-rest)
    if quotients:
        base, by = unknown.args
        shift = sympy.expand(base - wanted)
        if shift.has(wanted) or shift.has(given) or not by.is_positive or by.has(given):
            return ANYWHERE
        end = sympy.expand(by * end - shift + (by - 1 if slope == -1 else 0))
    if not rising(end, given) or end.free_symbols & (_POSITIONS - {given}):
        return ANYWHERE
    return Hull(high=end) if slope == -1 else Hull(low=end)


def rising(e: sympy.Expr, s: sympy.Symbol) -> bool:
    """Whether ``e`` is proved never to decrease where ``s`` grows."""
    if e == s or not e.has(s):
        return True
    if e.is_Add or isinstance(e, Max | Min):
        return all(rising(a, s) for a in e.args)
    if e.is_Mul:
        constant, varying = e.as_independent(s, as_Add=False)
        return bool(constant.is_nonnegative) and constant.is_integer is True and rising(varying, s)
    if isinstance(e, FloorDiv):
        return rising(e.args[0], s) and not e.args[1].has(s) and bool(e.args[1].is_positive)
    return False
