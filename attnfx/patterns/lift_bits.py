"""Lifting rules of operations on the bits of integers, and of remainders and quotients that round towards zero."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.patterns.lift import Index, Lifter, operation, position_rule, rule
from attnfx.patterns.lift_values import _aligned, _dtype, _logic, _unwrapped


def _whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _constant(e: Expr) -> int | None:
    return int(e.value) if isinstance(e, Int) and e.value.is_Integer else None


def _operands(lifter: Lifter, node: fx.Node, index: Index) -> tuple[Expr, Expr]:
    a, b = _aligned(lifter.broadcast(node.args[0], index), lifter.broadcast(node.args[1], index), _dtype(node))
    return a, b


def _bits(op: str, logic: Callable[..., Expr]) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    """Booleans by ``logic``, integers by the operation ``op``; the lowest bits of an integer are its modulo."""
    booleans = _logic(logic)

    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        if not _whole(_dtype(node)):
            return booleans(lifter, node, index)
        a, b = _operands(lifter, node, index)
        for x, y in ((a, b), (b, a)):
            mask = _constant(y)
            if op == "bitand" and mask is not None and mask >= 0 and mask & (mask + 1) == 0:
                return lifter.modulo(x, sympy.Integer(mask + 1))
        return expr.call(op, a, b, dtype=torch.int64)

    return apply


rule("aten.__and__", "aten.bitwise_and")(_bits("bitand", expr.logical_and))
rule("aten.__or__", "aten.bitwise_or")(_bits("bitor", expr.logical_or))
rule("aten.__xor__", "aten.bitwise_xor")(_bits("bitxor", lambda a, b: expr.call("xor", a, b, dtype=torch.bool)))


def _shifted(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """By a constant: a product, or a quotient rounded down."""
    if not _whole(_dtype(node)):
        return None
    a, b = _operands(lifter, node, index)
    by = _constant(b)
    if by is None or not 0 <= by < 8 * _dtype(node).itemsize - 1:
        return None
    step = sympy.Integer(2**by)
    return expr.mul(a, Int(step)) if "left" in operation(node) or "lshift" in operation(node) else lifter.floordiv(a, step)


position_rule("aten.__lshift__", "aten.__rshift__", "aten.bitwise_left_shift", "aten.bitwise_right_shift")(_unwrapped(_shifted))


@position_rule("aten.fmod")
def _fmod(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """The remainder with the sign of the dividend, of integers by a constant."""
    if not _whole(_dtype(node)):
        return None
    a, b = _operands(lifter, node, index)
    by = _constant(b)
    if by is None or by == 0:
        return None
    size = sympy.Integer(abs(by))
    return _mirrored(lifter, a, lambda x: lifter.modulo(x, size))


def truncated(lifter: Lifter, a: Expr, b: Expr) -> Expr | None:
    """``a / b`` of integers rounded towards zero, for a constant ``b``."""
    by = _constant(b)
    if by is None or by == 0:
        return None
    size = sympy.Integer(abs(by))
    found = _mirrored(lifter, a, lambda x: lifter.floordiv(x, size))
    return found if by > 0 else _minus(found)


def _mirrored(lifter: Lifter, a: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """``function(a)`` where a >= 0, ``-function(-a)`` elsewhere."""
    negative = lifter.less(a, expr.integer(0))
    above = function(a) if negative != expr.TRUE else expr.integer(0)
    below = _minus(function(_minus(a))) if negative != expr.FALSE else above
    return expr.where(negative, below, above, torch.int64)


def _minus(e: Expr) -> Expr:
    return Int(-e.value) if isinstance(e, Int) else expr.call("neg", e, dtype=torch.int64)
