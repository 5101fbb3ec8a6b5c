"""The score program as a function of the dot product: widened to its working precision, and differentiated."""

from __future__ import annotations

import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Const, Expr, Int, Score, call, children, constant

ONE, ZERO = constant(1.0, torch.float32), constant(0.0, torch.float32)


def widened(score: Expr) -> Expr:
    """``score`` with everything that depends on the dot product in float32, casts of it dropped: nearer to exact than the model.

    What does not depend on it keeps the model's own dtypes and roundings.
    """
    memo: dict[Expr, tuple[Expr, bool]] = {}

    def visit(node: Expr) -> tuple[Expr, bool]:
        if node not in memo:
            memo[node] = remade(node)
        return memo[node]

    def remade(node: Expr) -> tuple[Expr, bool]:
        if isinstance(node, Score):
            return node, True
        parts = [visit(c) for c in children(node)]
        if not isinstance(node, Call) or not any(depends for _, depends in parts):
            return node, False
        if node.op == "cast" and node.dtype.is_floating_point:
            return parts[0][0], True
        dtype = torch.float32 if node.dtype.is_floating_point else node.dtype
        return Call(node.op, tuple(part for part, _ in parts), dtype), True

    return visit(score)[0]


def derivative(score: Expr) -> Expr | None:
    """d ``score`` / d dot as an expression, None where an operation on the way has none here.

    >>> derivative(0.5 * Score()) == constant(0.5, torch.float32)
    True
    """
    try:
        return _Derivative().of(score)
    except _NoDerivative:
        return None


class _NoDerivative(Exception):
    pass


class _Derivative:
    """Forward differentiation, one memo for a whole expression. ZERO stands for independence of the score."""

    def __init__(self) -> None:
        self.memo: dict[Expr, Expr] = {}

    def of(self, e: Expr) -> Expr:
        if e not in self.memo:
            self.memo[e] = self._of(e)
        return self.memo[e]

    def _of(self, e: Expr) -> Expr:
        if isinstance(e, Score):
            return ONE
        if not has_score(e):
            return ZERO
        assert isinstance(e, Call)
        rule = getattr(self, f"_{e.op}", None)
        if rule is None:
            raise _NoDerivative
        made: Expr = rule(e)
        return made

    def _cast(self, e: Call) -> Expr:
        if not e.dtype.is_floating_point:
            raise _NoDerivative
        return self.of(e.args[0])

    def _neg(self, e: Call) -> Expr:
        return _scaled(self.of(e.args[0]), constant(-1.0, torch.float32))

    def _add(self, e: Call) -> Expr:
        return _sum(self.of(e.args[0]), self.of(e.args[1]))

    def _sub(self, e: Call) -> Expr:
        return _sum(self.of(e.args[0]), _scaled(self.of(e.args[1]), constant(-1.0, torch.float32)))

    def _mul(self, e: Call) -> Expr:
        a, b = e.args
        return _sum(_scaled(self.of(a), b), _scaled(self.of(b), a))

    def _div(self, e: Call) -> Expr:
        a, b = e.args
        if has_score(b):
            raise _NoDerivative
        inner = self.of(a)
        if isinstance(inner, Const) and isinstance(b, Const | Int) and _number(b) is not None:
            return Const(float(inner.value) / float(_number(b) or 1.0), torch.float32)
        return call("div", inner, b, dtype=torch.float32)

    def _tanh(self, e: Call) -> Expr:
        square = call("mul", e, e, dtype=torch.float32)
        return _scaled(self.of(e.args[0]), call("sub", ONE, square, dtype=torch.float32))

    def _sigmoid(self, e: Call) -> Expr:
        rest = call("sub", ONE, e, dtype=torch.float32)
        return _scaled(self.of(e.args[0]), call("mul", e, rest, dtype=torch.float32))

    def _exp(self, e: Call) -> Expr:
        return _scaled(self.of(e.args[0]), e)

    def _where(self, e: Call) -> Expr:
        condition, a, b = e.args
        if has_score(condition):
            raise _NoDerivative
        left, right = self.of(a), self.of(b)
        return left if left == right else Call("where", (condition, left, right), torch.float32)


def _number(e: Expr) -> float | None:
    if isinstance(e, Int):
        return float(int(e.value)) if e.value.is_Integer and e.value != 0 else None
    return float(e.value) if isinstance(e, Const) and e.value != 0 else None


def _sum(a: Expr, b: Expr) -> Expr:
    if ZERO in (a, b):
        return b if a == ZERO else a
    return call("add", a, b, dtype=torch.float32)


def _scaled(a: Expr, factor: Expr) -> Expr:
    """a * factor, with the products of constants folded."""
    if ZERO in (a, factor):
        return ZERO
    if isinstance(a, Const) and isinstance(factor, Const):
        # not rounded to float32 yet: an oracle in float64 wants all of it
        return Const(float(a.value) * float(factor.value), torch.float32)
    if expr.is_number(a, 1):
        return factor
    return a if expr.is_number(factor, 1) else call("mul", a, factor, dtype=torch.float32)
