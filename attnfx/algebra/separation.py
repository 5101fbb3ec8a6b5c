"""Biases as algebra: a formula of query and key as a sum of products of a part of the query and a part of the key.

    bias(i, j)  =  sum_r u_r(i) * v_r(j)  +  key(j)  +  row(i)

    slope * (j - i)          row -slope * i, key slope * j                       ALiBi, arXiv:2108.12409
    |x_i - x_j|^2            products -2 x_i * x_j, one for each coordinate       FlashBias, arXiv:2505.12044
    cos(w * (i - j))         cos(w i) cos(w j) + sin(w i) sin(w j)

The softmax of a row does not see ``row``. The identity is one of real numbers: sums in float32 and float64 are taken apart, and
what the model rounds to half precision as one number of query and key stays one. Numbers of the query alone or the key alone are
taken as they are, with all of their roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import INDEX, Call, Const, Expr, Int, Load

I, J = INDEX["i"], INDEX["j"]
WIDE = (torch.float32, torch.float64)
F64 = torch.float64
#: A formula of more nodes, or more products, is not worth the search.
NODES, PRODUCTS = 120, 160
#: Centres of integer parts: ``x - c`` takes the place of ``x`` where queries and keys have the same ``c``.
Centres = tuple[tuple[sympy.Expr, int], ...]


@dataclass(frozen=True)
class Separation:
    """``sum of u * v over terms + per_key + row_constant``: each u depends on no j, each v and per_key on no i, in float64."""

    terms: tuple[tuple[Expr, Expr], ...]
    per_key: Expr | None
    row_constant: Expr | None

    @property
    def rank(self) -> int:
        """How many numbers of each key the scores need: what is constant along a row is none of them."""
        return len(self.terms) + (self.per_key is not None)

    @property
    def whole(self) -> Expr:
        """The sum, as one expression."""
        parts = [expr.mul(u, v, F64) for u, v in self.terms] + [e for e in (self.per_key, self.row_constant) if e is not None]
        total = parts[0]
        for part in parts[1:]:
            total = expr.add(total, part, F64)
        return total


class _Inseparable(Exception):
    pass


@lru_cache(maxsize=512)
def separation(e: Expr, centres: Centres = ()) -> Separation | None:
    """``e`` taken apart; None where query and key meet in anything but sums, products, whole powers, sin, cos and exp.

    The result was proved by expanding it again, and compared with ``e`` at random points.
    """
    if not e.dtype.is_floating_point or has_score(e) or sum(1 for _ in expr.walk(e)) > NODES:
        return None
    opened = _Opened(dict(centres))
    try:
        whole = sympy.expand(opened.visit(e))
        found, again = opened.separated(whole)
    except _Inseparable:
        return None
    from attnfx.algebra.separation_check import agree

    return found if sympy.expand(again - whole) == 0 and agree(e, found) else None


class _Opened:
    """One formula as a polynomial in symbols that stand for parts of the query ("i"), of the key ("j") or of neither ("")."""

    def __init__(self, centres: Mapping[sympy.Expr, int]) -> None:
        self.centres = centres
        self.symbols: dict[Expr, sympy.Symbol] = {}
        self.parts: dict[sympy.Symbol, tuple[Expr, str]] = {}

    def visit(self, e: Expr) -> sympy.Expr:
        if isinstance(e, Int):
            return self._integer(e.value)
        if isinstance(e, Const) and not isinstance(e.value, bool) and abs(e.value) < 1e30:
            return sympy.Rational(e.value)
        if isinstance(e, Call) and e.dtype in WIDE:
            rule = getattr(self, f"_{e.op}", None)
            if rule is not None and (opened := rule(e)) is not None:
                return opened
        return self._part(e)

    def _part(self, e: Expr) -> sympy.Symbol:
        """``e`` as one symbol."""
        kind = "".join(name for name in "ij" if expr.depends_on(e, name))
        if kind == "ij":
            raise _Inseparable
        if e not in self.symbols:
            self.symbols[e] = symbol = sympy.Symbol(f"{kind or 'c'}{len(self.parts)}", real=True)
            self.parts[symbol] = (e, kind)
        return self.symbols[e]

    def _integer(self, e: sympy.Expr) -> sympy.Expr:
        e = sympy.expand(e)
        if not e.args:
            return e if e.is_Integer else self._generator(e)
        if e.is_Add or e.is_Mul or (e.is_Pow and e.args[1].is_Integer and e.args[1] > 0):
            return e.func(*(a if a.is_Number else self._integer(a) for a in e.args))
        return self._generator(e)

    def _generator(self, e: sympy.Expr) -> sympy.Expr:
        centre = self.centres.get(e, 0)
        return self._part(Int(e - centre)) + centre

    def _add(self, e: Call) -> sympy.Expr:
        return self.visit(e.args[0]) + self.visit(e.args[1])

    def _sub(self, e: Call) -> sympy.Expr:
        return self.visit(e.args[0]) - self.visit(e.args[1])

    def _mul(self, e: Call) -> sympy.Expr:
        return self._small(self.visit(e.args[0]) * self.visit(e.args[1]))

    def _neg(self, e: Call) -> sympy.Expr:
        return -self.visit(e.args[0])

    def _div(self, e: Call) -> sympy.Expr:
        below = e.args[1]
        if isinstance(below, Const | Int) and (number := self.visit(below)).is_Rational and number != 0:
            return self.visit(e.args[0]) / number
        return self._small(self.visit(e.args[0]) * self._part(expr.div(expr.constant(1.0, F64), expr.cast(below, F64), F64)))

    def _pow(self, e: Call) -> sympy.Expr | None:
        power = e.args[1].value if isinstance(e.args[1], Const | Int) else None
        return self._small(self.visit(e.args[0]) ** int(power)) if power in (1, 2, 3, 4) else None

    def _cast(self, e: Call) -> sympy.Expr | None:
        inner = e.args[0]
        opened = isinstance(inner, Int) or (inner.dtype in WIDE and isinstance(inner, Call | Const))
        return self.visit(inner) if opened else None

    def _sin(self, e: Call) -> sympy.Expr | None:
        return self._periodic(e)

    def _cos(self, e: Call) -> sympy.Expr | None:
        return self._periodic(e)

    def _periodic(self, e: Call) -> sympy.Expr | None:
        if not expr.depends_on(e, "i") or not expr.depends_on(e, "j"):
            return None
        (sin_i, sin_j), (cos_i, cos_j) = (self._of_sides(e.args[0], op) for op in ("sin", "cos"))
        return sin_i * cos_j + cos_i * sin_j if e.op == "sin" else cos_i * cos_j - sin_i * sin_j

    def _exp(self, e: Call) -> sympy.Expr | None:
        if not expr.depends_on(e, "i") or not expr.depends_on(e, "j"):
            return None
        of_query, of_key = self._of_sides(e.args[0], "exp")
        return of_query * of_key

    def _of_sides(self, argument: Expr, op: str) -> tuple[sympy.Expr, sympy.Expr]:
        """``op`` of the query's part of a sum (with all that is the key's not), and of the key's part."""
        sides = {"i": sympy.Integer(0), "j": sympy.Integer(0)}
        for term in sympy.Add.make_args(sympy.expand(self.visit(argument))):
            kinds = self._kinds(term)
            if kinds == {"i", "j"}:
                raise _Inseparable
            sides["j" if kinds == {"j"} else "i"] += term
        of_query, of_key = (self._part(Call(op, (self.expression(side),), F64)) for side in sides.values())
        return of_query, of_key

    def _kinds(self, term: sympy.Expr) -> set[str]:
        return {self.parts[s][1] for s in term.free_symbols} - {""}

    def _small(self, e: sympy.Expr) -> sympy.Expr:
        e = sympy.expand(e)
        if len(sympy.Add.make_args(e)) > PRODUCTS:
            raise _Inseparable
        return e

    def separated(self, whole: sympy.Expr) -> tuple[Separation, sympy.Expr]:
        """The separation of an expanded polynomial, and what it expands to."""
        entries: dict[tuple[sympy.Expr, sympy.Expr], sympy.Expr] = {}
        for term in sympy.Add.make_args(whole):
            number, factors = term.as_coeff_mul()
            of = {"": number, "i": sympy.Integer(1), "j": sympy.Integer(1)}
            for factor in factors:
                kinds = self._kinds(factor)
                of[kinds.pop() if kinds else ""] *= factor
            at = of["i"], of["j"]
            entries[at] = entries.get(at, sympy.Integer(0)) + of[""]
        one = sympy.Integer(1)
        row = sum((c * u for (u, v), c in entries.items() if v == one), sympy.Integer(0))
        key = sum((c * v for (u, v), c in entries.items() if u == one and v != one), sympy.Integer(0))
        products = _factored({at: c for at, c in entries.items() if one not in at})
        again = row + key + sum((u * v for u, v in products), sympy.Integer(0))
        terms = tuple((self.expression(u), self.expression(v)) for u, v in products)
        per_key, constant = (None if x == 0 else self.expression(x) for x in (key, row))
        return Separation(terms, per_key, constant), again

    def expression(self, e: sympy.Expr) -> Expr:
        """A polynomial in our symbols as an expression, in float64; integers stay exact integers until they are added up."""
        total: Expr | None = None
        whole = sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(e)):
            made = self._product(term)
            if isinstance(made, Int):
                whole += made.value
            else:
                total = made if total is None else expr.add(total, made, F64)
        if total is None:
            return expr.cast(Int(sympy.expand(whole)), F64)
        return total if whole == 0 else expr.add(total, expr.cast(Int(sympy.expand(whole)), F64), F64)

    def _product(self, term: sympy.Expr) -> Expr:
        number, factors = term.as_coeff_mul()
        whole, floats = sympy.Integer(1), []
        for factor in factors:
            symbol, power = factor.as_base_exp()
            part = self.parts[symbol][0]
            if isinstance(part, Int):
                whole *= part.value**power
            else:
                floats += [expr.cast(part, F64)] * int(power)
        if not floats and number.is_Integer:
            return Int(sympy.expand(number * whole))
        if whole != 1:
            floats.append(expr.cast(Int(sympy.expand(whole)), F64))
        made = floats[0] if floats else expr.constant(1.0, F64)
        for other in floats[1:]:
            made = expr.mul(made, other, F64)
        return made if number == 1 else expr.mul(made, expr.constant(float(number), F64), F64)


def _factored(entries: Mapping[tuple[sympy.Expr, sympy.Expr], sympy.Expr]) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """The fewest products whose sum is that of ``c * u * v`` over ``entries``, with divisions by plain numbers only."""
    rows, columns = (sorted({at[axis] for at in entries}, key=str) for axis in (0, 1))
    if not rows:
        return []
    matrix = sympy.Matrix(len(rows), len(columns), lambda r, c: entries.get((rows[r], columns[c]), sympy.Integer(0)))
    if all(x.is_Rational for x in matrix):
        reduced, pivots = matrix.rref()
        return [
            (sum(matrix[r, p] * rows[r] for r in range(len(rows))), sum(reduced[k, c] * columns[c] for c in range(len(columns))))
            for k, p in enumerate(pivots)
        ]
    if len(rows) <= len(columns):
        return [(u, sum(matrix[r, c] * v for c, v in enumerate(columns))) for r, u in enumerate(rows)]
    return [(sum(matrix[r, c] * u for r, u in enumerate(rows)), v) for c, v in enumerate(columns)]


def additive(e: Expr, factor: float = 1.0, stop: Callable[[Expr], bool] | None = None) -> tuple[tuple[Expr, float], ...]:
    """``(part, c)`` with ``e`` = the sum of ``c * part``, sums in float32 and float64 taken apart, except where ``stop`` says that
    they are a part. No cast is looked through, so that no part loses a rounding.

    >>> from attnfx.expr import Score
    >>> [(str(part), c) for part, c in additive((Score() - 2.0) * 0.5)]
    [('q·k', 0.5), ('2', -0.5)]
    """
    if isinstance(e, Call) and e.dtype in WIDE and not (stop is not None and stop(e)):
        if e.op in ("add", "sub"):
            return additive(e.args[0], factor, stop) + additive(e.args[1], factor if e.op == "add" else -factor, stop)
        if e.op == "neg":
            return additive(e.args[0], -factor, stop)
        for part, number in ((e.args[0], e.args[-1]), (e.args[-1], e.args[0])):
            if e.op == "mul" and isinstance(number, Const) and number.dtype != torch.bool:
                return additive(part, factor * float(number.value), stop)
        if e.op == "div" and isinstance(e.args[1], Const) and e.args[1].value:
            return additive(e.args[0], factor / float(e.args[1].value), stop)
    return ((e, factor),)


def bias_rank(score: Expr) -> int | None:
    """The rank of all that a score program adds to its scores, up to what is constant along a row; None where it has none."""
    products, per_key = 0, False
    for part, _ in additive(score, stop=lambda e: not has_score(e)):
        if has_score(part) or not expr.depends_on(part, "j"):
            continue
        if not expr.depends_on(part, "i"):
            per_key = True
            continue
        found = separation(part)
        if found is None:
            return None
        products, per_key = products + len(found.terms), per_key or found.per_key is not None
    return products + per_key


def loads(e: Expr | None) -> frozenset[Load]:
    """Every element that ``e`` reads."""
    return frozenset() if e is None else frozenset(n for n in expr.walk(e) if isinstance(n, Load))
