"""Lifting rules of further functions of one number: rounding, signs, logarithms, activations, tests for infinity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr
from attnfx.patterns.lift import Index, Lifter, operation, position_rule, rule
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.lift_values import _aligned, _clamp, _dtype, _unary

rule("aten.clip", "aten.clip_")(_clamp)
for _name, _op in (("log2", "log2"), ("log1p", "log1p"), ("erf", "erf"), ("special_expit", "sigmoid")):
    position_rule(f"aten.{_name}")(_unary(_op))


def _rounding(op: str) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    """An integer is its own rounding."""

    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        if argument(node, 1, "decimals", 0) != 0:
            return None
        x = lifter.element(node.args[0], index)
        return expr.call(op, x, dtype=_dtype(node)) if _dtype(node).is_floating_point else x

    return apply


for _name, _op in (("ceil", "ceil"), ("round", "round"), ("trunc", "trunc"), ("fix", "trunc")):
    position_rule(f"aten.{_name}", f"aten.{_name}_")(_rounding(_op))


@position_rule("aten.square")
def _square(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lifter.element(node.args[0], index)
    return expr.mul(x, x, _dtype(node))


@position_rule("aten.reciprocal")
def _reciprocal(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lifter.element(node.args[0], index)
    return expr.div(expr.constant(1.0, _dtype(node)), expr.cast(x, _dtype(node)), _dtype(node))


@position_rule("aten.sign", "aten.sgn")
def _sign(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """1, 0 or -1; of NaN 0."""
    dtype = _dtype(node)
    if dtype == torch.bool:
        return lifter.element(node.args[0], index)
    x, zero = lifter.element(node.args[0], index), expr.constant(0, dtype)
    below = lifter.less(x, zero)
    rest = expr.where(lifter.less(zero, x), expr.constant(1, dtype), zero, dtype)
    return expr.where(below, expr.constant(-1, dtype), rest, dtype)


@position_rule("aten.fmin", "aten.fmax")
def _known_extremum(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """The smaller or larger number, where only one is a number that one."""
    make = expr.minimum if operation(node) == "aten.fmin" else expr.maximum
    a, b = _aligned(lifter.broadcast(node.args[0], index), lifter.broadcast(node.args[1], index), _dtype(node))
    if not _dtype(node).is_floating_point:
        return make(a, b, _dtype(node))
    return expr.where(expr.ne(a, a), b, expr.where(expr.ne(b, b), a, make(a, b, _dtype(node)), _dtype(node)), _dtype(node))


@position_rule("aten.frac")
def _fraction(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lifter.element(node.args[0], index)
    whole = expr.call("trunc", x, dtype=_dtype(node))
    return expr.sub(x, whole, _dtype(node)) if _dtype(node).is_floating_point else None


@position_rule("aten.relu", "aten.hardtanh", "aten.relu6")
def _limited(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    dtype, name = _dtype(node), operation(node)
    low: float = argument(node, 1, "min_val", -1) if name == "aten.hardtanh" else 0
    high: float = 6 if name == "aten.relu6" else argument(node, 2, "max_val", 1) if name == "aten.hardtanh" else math.inf
    x = expr.maximum(*_aligned(lifter.element(node.args[0], index), expr.constant(low, dtype), dtype), dtype=dtype)
    return x if high == math.inf else expr.minimum(*_aligned(x, expr.constant(high, dtype), dtype), dtype=dtype)


@position_rule("aten.isinf", "aten.isposinf", "aten.isneginf", "aten.isfinite")
def _infinite(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x, name = lifter.element(node.args[0], index), operation(node)
    if not x.dtype.is_floating_point:
        return expr.TRUE if name == "aten.isfinite" else expr.FALSE
    above, below = (expr.constant(value, x.dtype) for value in (math.inf, -math.inf))
    if name == "aten.isfinite":
        return expr.logical_and(expr.lt(below, x), expr.lt(x, above))
    ends = {"aten.isinf": (above, below), "aten.isposinf": (above,), "aten.isneginf": (below,)}[name]
    return expr.logical_or(*(expr.eq(x, end) for end in ends))
