"""What a keep predicate can be in a tile of queries and keys: two predicates of the tile's corners that enclose it.

A tile holds the queries ``i_first <= i <= i_last`` and the keys ``j_first <= j <= j_last`` of one b and h. ``must`` says that the
predicate certainly holds in all of it, ``may`` that it can hold somewhere: interval arithmetic (Moore 1966) on the formula. What
depends on one side alone and reads data is taken whole, as a *profile*: its least and its largest value in the tile are data
of the tile. So a tile of two documents' ids is decided where the ranges of ids are apart, or are the same single id.

Both predicates are right for every tile: a float step is widened by more than any rounding, a NaN, an integer that overflows its
dtype, a divisor that is not positive and an operation without a rule leave the tile undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

from attnfx import expr
from attnfx.algebra import fields
from attnfx.algebra.integers import FloorDiv
from attnfx.algebra.interval_arithmetic import Interval, every, fits, of_floats, of_integers, of_positions, widened, within
from attnfx.algebra.nodes import has_score
from attnfx.expr import FALSE, INDEX, TRUE, Call, Const, Expr, Int, Load

#: Float operations that round nothing.
_EXACT = frozenset(("neg", "abs", "min", "max", "where", "floor"))
_BOOL = torch.bool
#: Tables of smaller blocks are not looked through: a tile meets too many of them.
LEAST_STEP = 8


@dataclass(frozen=True)
class Profile:
    """A value of one side: of b, h and i, or of b, h and j (``side``). Its ends in a tile are the loads ``2 n`` and ``2 n + 1``,
    without indices, for the profile at place ``n``; a NaN among the values makes both ends NaN.

    Or an element of a table of blocks, of both sides (``"ij"``): it depends on the position of each only by a quotient, with the
    divisors ``steps``. Positions a step apart, and the tile's last, therefore meet all of its values.
    """

    value: Expr
    side: str
    steps: tuple[int, int] = (1, 1)

    def samples(self, rows: int, columns: int) -> tuple[int, int]:
        """How many queries and keys of a tile of ``rows`` x ``columns`` meet all values."""
        return -(-(rows - 1) // self.steps[0]) + 1, -(-(columns - 1) // self.steps[1]) + 1


@dataclass(frozen=True)
class Enclosure:
    """``must`` implies that a predicate holds everywhere in a tile, and it holds nowhere unless ``may``."""

    must: Expr
    may: Expr
    profiles: tuple[Profile, ...]

    @property
    def decides(self) -> bool:
        """Whether there can be a tile of which anything is known."""
        return (self.must, self.may) != (FALSE, TRUE)


def enclose(keep: Expr) -> Enclosure:
    """The enclosure of a predicate without the score."""
    work = _Work()
    found = work.truth(keep)
    return Enclosure(found.must, found.may, tuple(work.profiles))


@dataclass(frozen=True)
class _Truth:
    must: Expr
    may: Expr


_UNDECIDED = _Truth(FALSE, TRUE)


def _profiled(e: Expr) -> bool:
    """Whether ``e`` is of one side, reads data, and computes nothing that two kernels might round differently."""
    if has_score(e) or (expr.depends_on(e, "i") and expr.depends_on(e, "j")):
        return False
    nodes = list(expr.walk(e))
    return any(isinstance(n, Load) for n in nodes) and all(_reproducible(n) for n in nodes)


def _steps(e: Expr) -> tuple[int, int] | None:
    """The divisors of i and of j, where ``e`` is an integer or boolean element of a table of blocks; None of anything else."""
    if not isinstance(e, Load) or e.dtype.is_floating_point or not all(isinstance(x, Int) for x in e.indices):
        return None
    values = [x.value for x in e.indices if isinstance(x, Int)]
    found = []
    for name in "ij":
        position = INDEX[name]
        quotients = {q for v in values for q in v.atoms(FloorDiv) if q.has(position)}
        if len(quotients) != 1:
            return None
        (quotient,) = quotients
        moved, step = quotient.args
        shift = sympy.expand(moved - position)
        apart = [v.xreplace({quotient: sympy.Dummy()}) for v in values]
        if not step.is_Integer or step < LEAST_STEP or shift.has(*INDEX.values()) or any(v.has(position) for v in apart):
            return None
        found.append(int(step))
    return found[0], found[1]


def _reproducible(n: Expr) -> bool:
    if not isinstance(n, Call) or n.op in expr.COMPARE:
        return True
    if n.op == "cast":
        return n.dtype.is_floating_point or not n.args[0].dtype.is_floating_point
    return not n.dtype.is_floating_point or n.op in _EXACT


class _Work:
    """One predicate being enclosed."""

    def __init__(self) -> None:
        self.profiles: dict[Profile, int] = {}
        self.truths: dict[Expr, _Truth] = {}
        self.intervals: dict[Expr, Interval | None] = {}

    def truth(self, e: Expr) -> _Truth:
        if e not in self.truths:
            self.truths[e] = self._truth(e)
        return self.truths[e]

    def interval(self, e: Expr) -> Interval | None:
        if e not in self.intervals:
            self.intervals[e] = self._interval(e)
        return self.intervals[e]

    def _ends(self, e: Expr) -> tuple[Load, Load]:
        """The ends of a profile; of a boolean one, as integers."""
        steps = _steps(e)
        profile = Profile(e, "ij", steps) if steps else Profile(e, "j" if expr.depends_on(e, "j") else "i")
        place = self.profiles.setdefault(profile, len(self.profiles))
        dtype = e.dtype if e.dtype.is_floating_point else torch.int64
        return Load(2 * place, (), dtype), Load(2 * place + 1, (), dtype)

    def _truth(self, e: Expr) -> _Truth:
        if isinstance(e, Const):
            return _Truth(e, e)
        if _profiled(e) or _steps(e):
            low, high = self._ends(e)
            return _Truth(expr.ne(low, expr.integer(0)), expr.ne(high, expr.integer(0)))
        if not isinstance(e, Call):
            return _UNDECIDED
        if e.op in ("and", "or") and all(a.dtype == _BOOL for a in e.args):
            join = expr.logical_and if e.op == "and" else expr.logical_or
            parts = [self.truth(a) for a in e.args]
            return _Truth(join(*(p.must for p in parts)), join(*(p.may for p in parts)))
        if e.op == "not" and e.args[0].dtype == _BOOL:
            return _not(self.truth(e.args[0]))
        if e.op == "where":
            return self._choice(e)
        if (each := fields.apart(e)) is not None:
            return self.truth(each)
        if e.op in expr.COMPARE or e.op == "xor":
            a, b = e.args
            if a.dtype == b.dtype == _BOOL:
                return self._same(a, b) if e.op == "eq" else _not(self._same(a, b)) if e.op in ("ne", "xor") else _UNDECIDED
            return self._compared(e.op, a, b) if e.op != "xor" else _UNDECIDED
        return _UNDECIDED

    def _choice(self, e: Call) -> _Truth:
        c, a, b = (self.truth(x) for x in e.args)
        both, either = expr.logical_and, expr.logical_or
        must = either(both(c.must, a.must), both(expr.logical_not(c.may), b.must), both(a.must, b.must))
        may = either(both(c.may, a.may), both(expr.logical_not(c.must), b.may))
        return _Truth(must, may)

    def _same(self, a: Expr, b: Expr) -> _Truth:
        """Whether two booleans are equal."""
        x, y = self.truth(a), self.truth(b)
        both, no = expr.logical_and, expr.logical_not
        must = expr.logical_or(both(x.must, y.must), both(no(x.may), no(y.may)))
        never = expr.logical_or(both(x.must, no(y.may)), both(no(x.may), y.must))
        return _Truth(must, no(never))

    def _compared(self, op: str, a: Expr, b: Expr) -> _Truth:
        if op == "ne":
            return _not(self._compared("eq", a, b))
        if isinstance(a, Int) and isinstance(b, Int):  # one interval of the difference: i - j is exact
            a, b = Int(sympy.expand(a.value - b.value)), expr.integer(0)
        floats = a.dtype.is_floating_point or b.dtype.is_floating_point
        x, y = (self._as_float(t) if floats else self.interval(t) for t in (a, b))
        if x is None or y is None:
            return _UNDECIDED
        if not floats:
            x, y = (fits(t, expr.promote(a, b)) for t in (x, y))
        known = every(x.known, y.known)
        if op == "eq":
            must = expr.logical_and(expr.eq(x.low, x.high), expr.eq(y.low, y.high), expr.eq(x.low, y.low))
            may = expr.logical_and(expr.le(x.low, y.high), expr.le(y.low, x.high))
        else:
            compare = expr.le if op == "le" else expr.lt
            must, may = compare(x.high, y.low), compare(x.low, y.high)
        return _Truth(expr.logical_and(known, must), expr.logical_or(expr.logical_not(known), may))

    def _as_float(self, e: Expr) -> Interval | None:
        """What a comparison with a float compares: integers are rounded to float32."""
        x = self.interval(e)
        if x is None or e.dtype.is_floating_point:
            return x
        return widened(expr.cast(x.low, torch.float32), expr.cast(x.high, torch.float32), torch.float32, x.known)

    def _interval(self, e: Expr) -> Interval | None:
        if isinstance(e, Int):
            return of_positions(e.value)
        if isinstance(e, Const):
            return None if e.dtype == _BOOL else Interval(e, e)
        if _profiled(e) or _steps(e):
            low, high = self._ends(e)
            return Interval(low, high, expr.eq(low, low))  # false of NaN
        if e.dtype == _BOOL:
            t = self.truth(e)
            return Interval(expr.cast(t.must, torch.int64), expr.cast(t.may, torch.int64))
        if not isinstance(e, Call):
            return None
        if e.op == "cast":
            return self._cast(e)
        if e.dtype.is_floating_point and any(_rounded(a, e.dtype) for a in e.args[e.op == "where" :]):
            return None
        if e.op == "where":
            return self._chosen(e)
        args = [self._operand(a, e.dtype) for a in e.args]
        known = [a for a in args if a is not None]
        if len(known) < len(args):
            return None
        return of_floats(e, known) if e.dtype.is_floating_point else of_integers(e, known)

    def _operand(self, e: Expr, dtype: torch.dtype) -> Interval | None:
        return self._as_float(e) if dtype.is_floating_point else self.interval(e)

    def _cast(self, e: Call) -> Interval | None:
        x, source = self.interval(e.args[0]), e.args[0].dtype
        if x is None:
            return None
        if e.dtype.is_floating_point:
            return Interval(expr.cast(x.low, e.dtype), expr.cast(x.high, e.dtype), x.known)
        if source.is_floating_point:  # towards zero, which rises too
            x = Interval(x.low, x.high, every(x.known, *(within(t, float(2**30)) for t in (x.low, x.high))))
            x = Interval(expr.cast(x.low, torch.int64), expr.cast(x.high, torch.int64), x.known)
        return fits(x, e.dtype)

    def _chosen(self, e: Call) -> Interval | None:
        c = self.truth(e.args[0])
        a, b = (self._operand(x, e.dtype) for x in e.args[1:])
        if a is None or b is None:
            return None
        dtype = e.dtype if e.dtype.is_floating_point else torch.int64

        def end(x: Expr, y: Expr, both: Callable[..., Expr]) -> Expr:
            either = expr.where(expr.logical_not(c.may), y, both(x, y, dtype), dtype)
            return expr.where(c.must, x, either, dtype)

        return fits(Interval(end(a.low, b.low, expr.minimum), end(a.high, b.high, expr.maximum), every(a.known, b.known)), e.dtype)


def _rounded(e: Expr, dtype: torch.dtype) -> bool:
    """Whether an operation in ``dtype`` may round this operand first, which torch does and a kernel does not."""
    if isinstance(e, Const | Int) and (isinstance(e, Const) or e.value.is_Integer):
        exact = float(e.value)
        return not expr.is_number(expr.constant(exact, dtype), exact)
    if e.dtype.is_floating_point:
        return e.dtype != dtype and torch.promote_types(e.dtype, dtype) != dtype
    return dtype.itemsize < 4


def _not(t: _Truth) -> _Truth:
    return _Truth(expr.logical_not(t.may), expr.logical_not(t.must))
