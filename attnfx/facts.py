"""Proofs about a keep predicate: which of its parts bound the keys of a query in closed form, and what is left.

A predicate is a conjunction. Its terms ``j <= i + c``, ``i - j <= w``, ``j <= c``, ``c <= j`` (any affine inequality
with unit slopes) are
*proved* bounds: they decide whole blocks. Every other term stays a predicate that is evaluated element by element.
A fact is stated only if it follows from the expression for all sizes in range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from attnfx import expr
from attnfx.expr import INDEX, Call, Expr, Int
from attnfx.integers import Ranges

I, J = INDEX["i"], INDEX["j"]


@dataclass(frozen=True)
class Facts:
    """Bounds that a keep predicate implies, each inclusive and None where absent.

    ``delta_low <= i - j <= delta_high``, ``key_low <= j <= key_high``; ``rest`` holds the terms that are not bounds, and
    ``nonempty``
    tells that every query is proved to keep at least one key.
    """

    delta_low: tuple[sympy.Expr, ...] = ()
    delta_high: tuple[sympy.Expr, ...] = ()
    key_low: tuple[sympy.Expr, ...] = ()
    key_high: tuple[sympy.Expr, ...] = ()
    rest: tuple[Expr, ...] = ()
    nonempty: bool = False

    @property
    def full(self) -> bool:
        """Every key is kept for every query."""
        return not (self.bounded or self.rest)

    @property
    def bounded(self) -> bool:
        return bool(self.delta_low or self.delta_high or self.key_low or self.key_high)

    @property
    def causal_offset(self) -> sympy.Expr | None:
        """``c`` where the predicate is exactly ``j <= i + c``, else None."""
        only = not (self.delta_high or self.key_low or self.key_high or self.rest) and len(self.delta_low) == 1
        return sympy.expand(-self.delta_low[0]) if only else None

    @property
    def causal(self) -> bool:
        """Whether no query sees far past itself: some bound ``j <= i + c`` is proved."""
        return bool(self.delta_low)


def conjuncts(keep: Expr) -> tuple[Expr, ...]:
    if keep == expr.TRUE:
        return ()
    return keep.args if isinstance(keep, Call) and keep.op == "and" else (keep,)


def prove(keep: Expr, length_q: sympy.Expr, length_k: sympy.Expr, ranges: Ranges) -> Facts:
    """The facts of ``keep`` for queries ``0 <= i < length_q`` and keys ``0 <= j < length_k``."""
    inside = Ranges({I: sympy.Integer(0), J: sympy.Integer(0), **ranges.low}, {I: length_q - 1, J: length_k - 1, **ranges.high})
    bounds: dict[str, list[sympy.Expr]] = {"delta_low": [], "delta_high": [], "key_low": [], "key_high": []}
    rest = []
    for term in conjuncts(keep):
        slack = _slack(term)
        if slack is not None and inside.nonnegative(slack):
            continue  # always true
        found = None if slack is None else _bound(slack)
        if found is None:
            rest.append(term)
        elif found[1] not in bounds[found[0]]:
            bounds[found[0]].append(found[1])
    found_bounds = {name: tuple(values) for name, values in bounds.items()}
    facts = Facts(
        found_bounds["delta_low"], found_bounds["delta_high"], found_bounds["key_low"], found_bounds["key_high"], tuple(rest)
    )
    return replace(facts, nonempty=not rest and _nonempty(facts, length_k, inside))


def _slack(term: Expr) -> sympy.Expr | None:
    """``b - a`` of an integer inequality ``a <= b``."""
    if isinstance(term, Call) and term.op == "le" and all(isinstance(x, Int) for x in term.args):
        a, b = term.args
        assert isinstance(a, Int)
        assert isinstance(b, Int)
        return sympy.expand(b.value - a.value)
    return None


def _bound(slack: sympy.Expr) -> tuple[str, sympy.Expr] | None:
    """``slack >= 0`` as a bound on i - j or on j; the rest of the slack may hold sizes only."""
    slope_i, slope_j = slack.coeff(I), slack.coeff(J)
    constant = sympy.expand(slack - slope_i * I - slope_j * J)
    if constant.free_symbols & set(INDEX.values()):
        return None
    match (slope_i, slope_j):
        case (1, -1):
            return "delta_low", sympy.expand(-constant)
        case (-1, 1):
            return "delta_high", constant
        case (0, -1):
            return "key_high", constant
        case (0, 1):
            return "key_low", sympy.expand(-constant)
    return None


def _nonempty(facts: Facts, length_k: sympy.Expr, ranges: Ranges) -> bool:
    """Whether for every i the intervals of keys overlap: each lower end is at most each upper end."""
    lows = [sympy.Integer(0), *facts.key_low, *(I - d for d in facts.delta_high)]
    highs = [length_k - 1, *facts.key_high, *(I - d for d in facts.delta_low)]
    return all(ranges.nonnegative(sympy.expand(high - low)) for low in lows for high in highs)


def always_false(keep: Expr) -> bool:
    return any(term == expr.FALSE for term in conjuncts(keep))
