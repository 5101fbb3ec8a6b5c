"""Inequalities between sizes that hold whatever the sizes are, beyond what ShapeEnv decides by intervals alone."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from torch.utils._sympy.functions import FloorDiv, Max

#: The smallest value that an expression takes, None where it has no bound.
Lowest = Callable[[sympy.Expr], sympy.Integer | None]


def evident(claim: sympy.Basic, lowest: Lowest) -> bool:
    """Whether ``claim``, a comparison of integers, is proved: its slack is a polynomial without a negative coefficient in what
    every size exceeds its lower bound by. Floor-divisions are integers of their own; ``Max(1, x)`` is ``x`` where it is >= 1."""
    if not isinstance(claim, sympy.StrictLessThan | sympy.LessThan | sympy.StrictGreaterThan | sympy.GreaterThan | sympy.Ne):
        return False
    below, above = claim.args if not isinstance(claim, sympy.StrictGreaterThan | sympy.GreaterThan) else claim.args[::-1]
    strict = isinstance(claim, sympy.StrictLessThan | sympy.StrictGreaterThan | sympy.Ne)
    if isinstance(claim, sympy.Ne) and _nonnegative(below - above - 1, lowest):
        return True
    return _nonnegative(above - below - int(strict), lowest)


def _nonnegative(slack: sympy.Expr, lowest: Lowest) -> bool:
    slack = slack.replace(lambda e: isinstance(e, Max), lambda e: _largest(e, lowest))
    for atom in sorted(slack.atoms(FloorDiv, sympy.Symbol), key=lambda e: (isinstance(e, sympy.Symbol), -sympy.count_ops(e))):
        if not slack.has(atom):
            continue
        low = lowest(atom)
        if low is None:
            return False
        slack = slack.xreplace({atom: low + sympy.Dummy(integer=True, nonnegative=True)})
        if isinstance(atom, sympy.Symbol) and atom in slack.free_symbols:
            return False
    slack = sympy.expand(slack)
    free = sorted(slack.free_symbols, key=str)
    if not free:
        return bool(slack.is_nonnegative)
    return bool(slack.is_polynomial(*free)) and all(c.is_nonnegative for c in sympy.Poly(slack, *free).coeffs())


def _largest(e: sympy.Expr, lowest: Lowest) -> sympy.Expr:
    numbers, others = [a for a in e.args if a.is_Integer], [a for a in e.args if not a.is_Integer]
    if len(numbers) == len(others) == 1 and (low := lowest(others[0])) is not None and low >= numbers[0]:
        return others[0]
    return e
