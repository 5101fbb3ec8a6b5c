"""Integer algebra for positions: floor-division, modulo, maxima and minima that simplify, and bounds of polynomials over ranges
of their symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

__all__ = ["FloorDiv", "Max", "Min", "Mod", "PythonMod", "Ranges", "extremum", "floordiv", "modulo", "recombined", "replace"]

#: How many maxima and minima are opened up, one inside the cases of another, to prove a bound.
NESTED = 3


@dataclass(frozen=True)
class Ranges:
    """What is known of each symbol: ``low <= symbol <= high`` (inclusive, either may be missing; bounds may hold size symbols)."""

    low: Mapping[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    high: Mapping[sympy.Symbol, sympy.Expr] = field(default_factory=dict)

    def minimum(self, e: sympy.Expr) -> sympy.Expr | None:
        """A lower bound of ``e`` that holds everywhere in range, as a number; None where none was found."""
        return self._least(sympy.expand(e))

    def maximum(self, e: sympy.Expr) -> sympy.Expr | None:
        """An upper bound of ``e`` as a number; None where none was found."""
        value = self._least(sympy.expand(-e))
        return None if value is None else -value

    def nonnegative(self, e: sympy.Expr) -> bool:
        """Whether ``e >= 0`` is proved."""
        low = self.minimum(e)
        return low is not None and bool(low >= 0)

    def _least(self, e: sympy.Expr, nested: int = NESTED) -> sympy.Expr | None:
        # Eliminate bounded symbols one by one: e is affine in each, so its minimum lies at an end of the range.
        for _ in range(24):
            if e.is_Integer:
                return e
            if e.is_Number or e.has(sympy.zoo, sympy.nan):
                return None
            choice = max(e.atoms(Max, Min), key=lambda x: (sympy.count_ops(x), str(x)), default=None)
            if choice is not None:
                return self._of_cases(e, choice, nested - 1) if nested else None
            step = self._eliminate(e)
            if step is None:
                return sympy.Integer(0) if e.is_nonnegative else None
            e = sympy.expand(step)
        return None

    def _of_cases(self, e: sympy.Expr, choice: sympy.Expr, nested: int) -> sympy.Expr | None:
        """A lower bound of ``e``, which is ``e`` with one of the operands of ``choice`` in its place."""
        cases = [self._least(sympy.expand(e.xreplace({choice: x})), nested) for x in choice.args]
        slope = e.coeff(choice)
        sign = 0 if (e - slope * choice).has(choice) else self._sign(slope)
        found = [x for x in cases if x is not None]
        if sign and (sign > 0) == isinstance(choice, Max):  # no operand makes e larger than choice does
            return max(found, default=None)
        return min(found) if len(found) == len(cases) else None

    def _eliminate(self, e: sympy.Expr) -> sympy.Expr | None:
        for atom in sorted(e.atoms(FloorDiv, Mod, PythonMod), key=str):
            bound = self._opaque(e, atom)
            if bound is not None:
                return bound
        # Symbols whose bounds mention other symbols (an index below its size) go first.
        order = sorted(e.free_symbols, key=lambda s: (not self._relative(s), str(s)))
        for s in order:
            slope = sympy.expand(e.diff(s)) if e.is_polynomial(s) else None
            if slope is None or slope.has(s):
                continue
            sign = self._sign(slope)
            end = self.low.get(s, sympy.Integer(0) if s.is_nonnegative else None) if sign > 0 else self.high.get(s)
            if sign and end is not None:
                return e.subs(s, end)
        return None

    def _relative(self, s: sympy.Symbol) -> bool:
        return any(bool(m[s].free_symbols) for m in (self.low, self.high) if s in m)

    def _sign(self, e: sympy.Expr) -> int:
        if e.is_nonnegative:
            return 1
        if e.is_nonpositive:
            return -1
        return 0

    def _opaque(self, e: sympy.Expr, atom: sympy.Expr) -> sympy.Expr | None:
        base, divisor = atom.args
        if not (divisor.is_positive and self.nonnegative(base)):
            return None
        slope = e.coeff(atom)
        if (e - slope * atom).has(atom) or self._sign(slope) == 0:
            return None
        if self._sign(slope) > 0:
            return e.subs(atom, 0)
        if isinstance(atom, Mod | PythonMod):
            return e.subs(atom, divisor - 1)
        most = self.maximum(base)
        return e.subs(atom, most // divisor) if most is not None and most.is_Integer and divisor.is_Integer else None


def floordiv(a: sympy.Expr, b: sympy.Expr, ranges: Ranges | None = None) -> sympy.Expr:
    """``floor(a / b)``; terms of ``a`` that ``b`` divides leave the quotient, a remainder proved to lie in [0, b) vanishes."""
    if b.is_negative:
        # torch's FloorDiv joins quotients as if no divisor were negative: (a // 2) // -8 is not a // -16
        return floordiv(sympy.expand(-a), -b, ranges)
    whole, rest = _split(sympy.expand(a), b)
    if rest == 0:
        return whole
    if _below(rest, b, ranges):
        return whole
    return whole + FloorDiv(rest, b)


def modulo(a: sympy.Expr, b: sympy.Expr, ranges: Ranges | None = None) -> sympy.Expr:
    """``a - b * floor(a / b)`` with the simplifications of :func:`floordiv`."""
    if b.is_negative:
        return sympy.expand(-modulo(sympy.expand(-a), -b, ranges))
    _, rest = _split(sympy.expand(a), b)
    if rest == 0 or _below(rest, b, ranges):
        return rest
    if rest.is_Integer and b.is_Integer:
        return sympy.Integer(int(rest) % int(b))
    return Mod(rest, b) if rest.is_nonnegative and b.is_positive else PythonMod(rest, b)


def extremum(kind: type[sympy.Expr], operands: Sequence[sympy.Expr], ranges: Ranges | None = None) -> sympy.Expr:
    """``Max`` or ``Min`` of ``operands`` without those that another one is proved to bound."""
    kept: list[sympy.Expr] = []
    for x in operands:
        if ranges is not None and any(_bounds(y, x, kind, ranges) for y in kept):
            continue
        kept = [y for y in kept if ranges is None or not _bounds(x, y, kind, ranges)] + [x]
    return kind(*kept)


def _bounds(a: sympy.Expr, b: sympy.Expr, kind: type[sympy.Expr], ranges: Ranges) -> bool:
    return ranges.nonnegative(a - b if kind is Max else b - a)


def recombined(e: sympy.Expr) -> sympy.Expr:
    """``e`` with digits put together again: ``b * floor(a / b) + a mod b`` is ``a``, for any factor of the whole."""
    e = sympy.expand(e)
    while True:
        step = _recombined_once(e)
        if step is None:
            return e
        e = sympy.expand(step)


def _recombined_once(e: sympy.Expr) -> sympy.Expr | None:
    for digit in e.atoms(Mod, PythonMod):
        base, by = digit.args
        factor = e.coeff(digit)
        if factor == 0 or factor.has(digit):
            continue
        for whole in e.atoms(FloorDiv):
            if sympy.expand(e.coeff(whole) - factor * by) == 0 and _same_quotient(whole, base, by):
                return e - factor * by * whole - factor * digit + factor * base
    return None


def _same_quotient(whole: sympy.Expr, base: sympy.Expr, by: sympy.Expr) -> bool:
    if whole.args == (base, by):
        return True
    return isinstance(base, FloorDiv) and whole.args == (base.args[0], sympy.expand(base.args[1] * by))


def _split(a: sympy.Expr, b: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    whole: list[sympy.Expr] = []
    rest: list[sympy.Expr] = []
    for term in sympy.Add.make_args(a):
        quotient = sympy.cancel(term / b)
        integral = quotient.is_Integer if b.is_Integer and term.is_Integer else quotient.is_integer and quotient.is_polynomial()
        (whole if integral else rest).append(quotient if integral else term)
    return sympy.Add(*whole), sympy.Add(*rest)


def _below(a: sympy.Expr, b: sympy.Expr, ranges: Ranges | None) -> bool:
    if a.is_Integer and b.is_Integer:
        return 0 <= int(a) < int(b)
    return ranges is not None and ranges.nonnegative(a) and ranges.nonnegative(b - 1 - a)


def replace(e: sympy.Expr, mapping: Mapping[sympy.Symbol, sympy.Expr], ranges: Ranges | None = None) -> sympy.Expr:
    """``e`` with symbols replaced, re-simplifying every floor-division, modulo, maximum and minimum on the way up, and
    sums of digits."""
    if not e.args:
        return mapping.get(e, e)
    args = [replace(a, mapping, ranges) for a in e.args]
    if isinstance(e, FloorDiv):
        return floordiv(args[0], args[1], ranges)
    if isinstance(e, Mod | PythonMod):
        return modulo(args[0], args[1], ranges)
    if isinstance(e, Max | Min):
        return extremum(type(e), args, ranges)
    made = sympy.expand(e.func(*args))
    return recombined(made) if made.is_Add and made.has(Mod, PythonMod) else made
