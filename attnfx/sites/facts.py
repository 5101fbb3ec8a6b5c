"""Proofs about a keep predicate: which of its parts bound the keys of a query in closed form, and what is left.

A predicate is a conjunction. Its terms ``j <= i + c``, ``i - j <= w``, ``j <= c``, ``c <= j`` (any affine inequality
with unit slopes) are
*proved* bounds: they decide whole blocks. Every other term stays a predicate that is evaluated element by element; an interval that
encloses what it keeps (:mod:`attnfx.algebra.hulls`) still tells blocks that it keeps nothing of. Terms that others imply vanish.
A fact is stated only if it follows from the expression for all sizes in range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from attnfx import expr
from attnfx.algebra.hulls import ANYWHERE, Hull, hull, slacks
from attnfx.algebra.integers import Ranges
from attnfx.expr import INDEX, Call, Expr

I, J = INDEX["i"], INDEX["j"]


@dataclass(frozen=True)
class Facts:
    """Bounds that a keep predicate implies, each inclusive and None where absent.

    ``delta_low <= i - j <= delta_high``, ``key_low <= j <= key_high``; ``rest`` holds the terms that are not bounds, and
    ``nonempty``
    tells that every query is proved to keep at least one key. ``keys`` and ``queries`` enclose what ``rest`` keeps: the keys of
    query i as functions of i, the queries of key j as functions of j.
    """

    delta_low: tuple[sympy.Expr, ...] = ()
    delta_high: tuple[sympy.Expr, ...] = ()
    key_low: tuple[sympy.Expr, ...] = ()
    key_high: tuple[sympy.Expr, ...] = ()
    rest: tuple[Expr, ...] = ()
    nonempty: bool = False
    keys: Hull = ANYWHERE
    queries: Hull = ANYWHERE

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
    inside = _inside(length_q, length_k, ranges)
    bounds: dict[str, list[sympy.Expr]] = {"delta_low": [], "delta_high": [], "key_low": [], "key_high": []}
    rest = []
    for term in conjuncts(keep):
        parts = slacks(term)
        if parts and all(inside.nonnegative(slack) for slack in parts):
            continue  # always true
        found = [_bound(slack) for slack in parts]
        if not found or None in found:
            rest.append(term)
            continue
        for name, value in filter(None, found):
            bounds[name] = _tightened(name, bounds[name], value, inside)
    for name in bounds:
        bounds[name] = [value for value in bounds[name] if not _above(name, value, bounds, inside)]
    rest = [term for term in rest if not _implied(term, bounds, inside)]
    low, high, first, last = (tuple(values) for values in bounds.values())
    facts = Facts(low, high, first, last, tuple(rest))
    nonempty = (not rest and _nonempty(facts, length_k, inside)) or _has_witness(keep, length_q, length_k, inside)
    both = expr.logical_and(*rest)
    found_keys, found_queries = hull(both, I, J, inside), hull(both, J, I, inside)
    return replace(facts, nonempty=nonempty, keys=found_keys or ANYWHERE, queries=found_queries or ANYWHERE)


def follows(slack: sympy.Expr, facts: Facts, length_q: sympy.Expr, length_k: sympy.Expr, ranges: Ranges) -> bool:
    """Whether ``slack`` is proved not to be negative at every query and key that the bounds of ``facts`` keep."""
    bounds = {name: list(getattr(facts, name)) for name in ("delta_low", "delta_high", "key_low", "key_high")}
    return _nonnegative(slack, bounds, _inside(length_q, length_k, ranges))


def _inside(length_q: sympy.Expr, length_k: sympy.Expr, ranges: Ranges) -> Ranges:
    return Ranges({I: sympy.Integer(0), J: sympy.Integer(0), **ranges.low}, {I: length_q - 1, J: length_k - 1, **ranges.high})


def _tightened(name: str, known: list[sympy.Expr], value: sympy.Expr, ranges: Ranges) -> list[sympy.Expr]:
    """The bounds of one kind with another one, without those that another one is proved to imply."""
    sign = 1 if name.endswith("low") else -1
    if any(ranges.nonnegative(sign * (x - value)) for x in known):
        return known
    return [x for x in known if not ranges.nonnegative(sign * (value - x))] + [value]


def _above(name: str, value: sympy.Expr, bounds: dict[str, list[sympy.Expr]], ranges: Ranges) -> bool:
    """Whether a bound of one key follows from one of the distance, which is below it for every query."""
    if name == "key_high":
        return any(ranges.nonnegative(sympy.expand(value - (I - d))) for d in bounds["delta_low"])
    if name == "key_low":
        return any(ranges.nonnegative(sympy.expand(I - d - value)) for d in bounds["delta_high"])
    return False


def _implied(term: Expr, bounds: dict[str, list[sympy.Expr]], ranges: Ranges) -> bool:
    """Whether ``term`` holds wherever the bounds do."""
    if isinstance(term, Call) and term.op in ("or", "and"):
        return (any if term.op == "or" else all)(_implied(part, bounds, ranges) for part in term.args)
    parts = slacks(term)
    return bool(parts) and all(_nonnegative(slack, bounds, ranges) for slack in parts)


def _nonnegative(slack: sympy.Expr, bounds: dict[str, list[sympy.Expr]], ranges: Ranges) -> bool:
    if ranges.nonnegative(slack):
        return True
    weight = slack.coeff(J)
    if (slack - weight * J).has(J) or not weight.is_Integer or weight == 0:
        return False
    # the least of a slack that falls with j is at the largest j, and the other way round
    ends = [I - d for d in bounds["delta_low" if weight < 0 else "delta_high"]] + bounds["key_high" if weight < 0 else "key_low"]
    return any(ranges.nonnegative(sympy.expand(slack.subs(J, end))) for end in ends)


def _has_witness(keep: Expr, length_q: sympy.Expr, length_k: sympy.Expr, ranges: Ranges) -> bool:
    """Whether one key that every query has is proved to be kept: its own, that at the end of equal runs, or the first one."""
    for place in dict.fromkeys((I, sympy.expand(I + length_k - length_q), sympy.Integer(0))):
        if ranges.nonnegative(place) and ranges.nonnegative(sympy.expand(length_k - 1 - place)):
            here = expr.substitute(keep, {J: place})
            if all(_always(term, ranges) for term in conjuncts(here)):
                return True
    return False


def _always(term: Expr, ranges: Ranges) -> bool:
    if term == expr.TRUE:
        return True
    if isinstance(term, Call) and term.op in ("or", "and"):
        return (any if term.op == "or" else all)(_always(part, ranges) for part in term.args)
    parts = slacks(term)
    return bool(parts) and all(ranges.nonnegative(slack) for slack in parts)


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
