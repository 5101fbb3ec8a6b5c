"""Formulas on one side of a diagonal: digits of positions and comparisons that are decided where j <= i + c, or where it is not.

A tensor that was shifted by padding and a view is read at ``(n * i + j + n) // (n + 1)``. Where ``j <= i`` this is ``i``, and the
remainder ``n - i + j``.
"""

from __future__ import annotations

import sympy

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod, Ranges, extremum, floordiv, modulo
from attnfx.expr import Call, Expr, Int

#: How far from its row a shift may read.
_ROWS = (0, 1, -1)


class Region:
    """The queries ``i`` and keys ``j`` of given ``ranges``; with an ``offset`` c only those where j <= i + c, or, ``beyond``,
    only the others."""

    def __init__(
        self, i: sympy.Symbol, j: sympy.Symbol, ranges: Ranges, offset: sympy.Expr | None = None, beyond: bool = False
    ) -> None:
        self.i, self.j, self.ranges, self.sided = i, j, ranges, offset is not None
        slack = sympy.Symbol("attnfx_slack", integer=True, nonnegative=True)
        c = sympy.Integer(0) if offset is None else offset
        self.place = i + c + 1 + slack if beyond else i + c - slack
        last_i, last_j = ranges.high[i], ranges.high[j]
        most = last_j - c - 1 if beyond else last_i + c
        self.within = Ranges({**ranges.low, slack: sympy.Integer(0)}, {**ranges.high, slack: sympy.expand(most)})

    def nonnegative(self, e: sympy.Expr) -> bool:
        """Whether ``e >= 0`` is proved in all of the region."""
        e = sympy.expand(e)
        return self.ranges.nonnegative(e) or (
            self.sided and self.within.nonnegative(sympy.expand(e.xreplace({self.j: self.place})))
        )

    def expression(self, e: Expr) -> Expr:
        """``e`` with what the region decides decided, and other comparisons as those of a difference with zero."""
        return expr.rebuild(e, self._leaf)

    def _leaf(self, node: Expr) -> Expr | None:
        if isinstance(node, Int):
            return Int(self.integer(node.value))
        if isinstance(node, Call) and node.op in ("le", "eq", "ne") and all(isinstance(a, Int) for a in node.args):
            a, b = (self.integer(x.value) for x in node.args if isinstance(x, Int))
            return self._compared(node.op, a, b)
        return None

    def _compared(self, op: str, a: sympy.Expr, b: sympy.Expr) -> Expr:
        if op == "le":
            if self.nonnegative(b - a):
                return expr.TRUE
            return expr.FALSE if self.nonnegative(a - b - 1) else expr.le(Int(sympy.expand(a - b)), expr.integer(0))
        if self.nonnegative(a - b - 1) or self.nonnegative(b - a - 1):
            return expr.constant(op == "ne", expr.TRUE.dtype)
        return (expr.eq if op == "eq" else expr.ne)(Int(sympy.expand(a - b)), expr.integer(0))

    def integer(self, e: sympy.Expr) -> sympy.Expr:
        """An integer with its quotients and remainders read as rows and places in them, where that is proved."""
        if not e.args:
            return e
        args = [self.integer(a) for a in e.args]
        if isinstance(e, FloorDiv | Mod | PythonMod):
            a, by = args
            row = self._row(a, by)
            if row is not None:
                return row if isinstance(e, FloorDiv) else sympy.expand(a - by * row)
            return (floordiv if isinstance(e, FloorDiv) else modulo)(a, by, self.ranges)
        if isinstance(e, Max | Min):
            return extremum(type(e), args, self.ranges)
        return sympy.expand(e.func(*args))

    def _row(self, a: sympy.Expr, by: sympy.Expr) -> sympy.Expr | None:
        """``floor(a / by)`` where it is the query, or a neighbour of it, throughout."""
        if self.i not in a.free_symbols or self.i in by.free_symbols:
            return None
        for step in _ROWS:
            rest = sympy.expand(a - by * (self.i + step))
            if self.nonnegative(rest) and self.nonnegative(by - 1 - rest):
                return self.i + step
        return None
