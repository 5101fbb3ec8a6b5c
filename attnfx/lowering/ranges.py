"""Which keys a run of queries can see, in closed form from the facts of the mask; and the same with the roles swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from attnfx.sites.facts import Facts, I, J

#: The ends of a run of positions, in candidates without an anchor.
FIRST, LAST = (sympy.Symbol(f"attnfx_{name}", integer=True, nonnegative=True) for name in ("first", "last"))


@dataclass(frozen=True)
class Bounds:
    """The four ends of a range ``lo <= full_lo <= full_hi <= hi``, each a list of candidates.

    A lower end is the largest of its candidates, an upper end (exclusive) the smallest; a candidate is ``(anchor, offset)`` for
    offset + first or last of the run (anchor "first", "last", or "" for none; an offset without one may hold the symbols FIRST and
    LAST). No candidate: no bound. ``full`` says whether
    anything at all is known to be kept entirely.
    """

    lo: tuple[tuple[str, sympy.Expr], ...]
    full_lo: tuple[tuple[str, sympy.Expr], ...]
    full_hi: tuple[tuple[str, sympy.Expr], ...]
    hi: tuple[tuple[str, sympy.Expr], ...]
    full: bool


Candidates = Sequence[tuple[str, sympy.Expr]]


def key_bounds(facts: Facts) -> Bounds | None:
    """Bounds of the keys of queries first..last; None where the mask has no closed-form bound."""
    enclosed = _ends(facts.keys.low, I, FIRST, 0), _ends(facts.keys.high, I, LAST, 1)
    if not facts.bounded and not any(enclosed):
        return None
    low = [("", c) for c in facts.key_low]
    high = [("", c + 1) for c in facts.key_high]
    # delta_low <= i - j <= delta_high: j >= i - delta_high and j <= i - delta_low
    return Bounds(
        lo=(*low, *(("first", -d) for d in facts.delta_high), *enclosed[0]),
        full_lo=(*low, *(("last", -d) for d in facts.delta_high)),
        full_hi=(*high, *(("first", 1 - d) for d in facts.delta_low)),
        hi=(*high, *(("last", 1 - d) for d in facts.delta_low), *enclosed[1]),
        full=not facts.rest,
    )


def query_bounds(facts: Facts) -> Bounds | None:
    """Bounds of the queries of keys first..last; keys beyond key_low and key_high only shrink what is full."""
    enclosed = _ends(facts.queries.low, J, FIRST, 0), _ends(facts.queries.high, J, LAST, 1)
    if not facts.bounded and not any(enclosed):
        return None
    # i >= j + delta_low and i <= j + delta_high
    return Bounds(
        lo=(*(("first", d) for d in facts.delta_low), *enclosed[0]),
        full_lo=tuple(("last", d) for d in facts.delta_low),
        full_hi=tuple(("first", d + 1) for d in facts.delta_high),
        hi=(*(("last", d + 1) for d in facts.delta_high), *enclosed[1]),
        full=not (facts.rest or facts.key_low or facts.key_high),
    )


def _ends(end: sympy.Expr | None, position: sympy.Symbol, run: sympy.Symbol, beyond: int) -> tuple[tuple[str, sympy.Expr], ...]:
    """An end that never decreases, at one end of a run."""
    return () if end is None else (("", sympy.expand(end.xreplace({position: run}) + beyond)),)
