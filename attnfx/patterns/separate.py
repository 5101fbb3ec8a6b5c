"""Separation of lifted logits into a score program, a keep predicate and its fill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Const, Expr

#: A constant at least this low, added or put in place of a score, is a mask; anything higher is a bias.
MASK_LEVEL = -1e4


@dataclass(frozen=True)
class Logits:
    """``score`` where ``keep``, else ``fill`` (added to the score if ``additive``)."""

    score: Expr
    keep: Expr = expr.TRUE
    fill: float = -math.inf
    additive: bool = False


def separate(z: Expr) -> Logits:
    """The parts of logits ``z``. What cannot be taken apart stays inside the score program, with its full meaning."""
    z = widened(z)
    if not isinstance(z, Call):
        return Logits(z)
    if z.op == "where":
        return _selected(z)
    if z.op == "add" and has_score(z.args[0]) != has_score(z.args[1]):
        scored, other = z.args if has_score(z.args[0]) else z.args[::-1]
        return _added(scored, other)
    if z.op == "sub" and has_score(z.args[0]) and not has_score(z.args[1]):
        # What is taken off a masked score may itself be infinite there, and leave NaN.
        plain = separate(z.args[0]).keep == expr.TRUE or not any(isinstance(n, expr.Load) for n in expr.walk(z.args[1]))
        return _added(z.args[0], negated(z.args[1])) if plain else Logits(z)
    if z.op in ("mul", "div") and has_score(z.args[0]) and isinstance(z.args[1], Const):
        return _scaled(z)
    return Logits(z)


def negated(e: Expr) -> Expr:
    """``-e``, which no rounding changes, with the sign taken as far inside as the numbers in it."""
    if isinstance(e, Const) and e.dtype.is_floating_point:
        return expr.constant(-e.value, e.dtype)
    if isinstance(e, Call) and e.dtype.is_floating_point:
        if e.op == "where":
            return expr.where(e.args[0], negated(e.args[1]), negated(e.args[2]), e.dtype)
        if e.op == "mul" and isinstance(e.args[1], Const):
            return expr.mul(e.args[0], negated(e.args[1]), e.dtype)
        if e.op == "mul" and isinstance(e.args[0], Const):
            return expr.mul(negated(e.args[0]), e.args[1], e.dtype)
        if e.op == "cast" and e.args[0].dtype.is_floating_point:
            return expr.cast(negated(e.args[0]), e.dtype)
    return expr.mul(e, expr.constant(-1.0, e.dtype), e.dtype) if e.dtype.is_floating_point else expr.call("neg", e, dtype=e.dtype)


def widened(e: Expr) -> Expr:
    """``e`` without the casts and half-precision steps on the way of the scores: they are computed in float32 throughout."""

    def wide(node: Expr) -> Expr | None:
        if isinstance(node, Call) and node.op == "cast" and _precise(node.dtype) and has_score(node):
            return widened(_overflowed(node.args[0], node.dtype))
        if isinstance(node, Call) and node.dtype in (torch.float16, torch.bfloat16) and has_score(node):
            return Call(node.op, tuple(widened(a) for a in node.args), torch.float32)
        return None

    return expr.rebuild(e, wide)


def _overflowed(e: Expr, dtype: torch.dtype) -> Expr:
    """``e`` whose fills are infinite where a cast to ``dtype`` has no room for them: float64's lowest number is -inf in float32,
    and a query without keys NaN."""
    if isinstance(e, Const) and e.dtype.is_floating_point and math.isinf(_in_dtype(float(e.value), dtype)):
        return expr.constant(_in_dtype(float(e.value), dtype), e.dtype)
    if isinstance(e, Call) and e.dtype.is_floating_point and e.op in ("where", "add", "cast"):
        kept = 1 if e.op == "where" else 0  # a condition has no fill
        return Call(e.op, (*e.args[:kept], *(_overflowed(a, dtype) for a in e.args[kept:])), e.dtype)
    return e


def _precise(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _selected(z: Call) -> Logits:
    condition, a, b = z.args
    if isinstance(a, Const) and has_score(b):
        condition, a, b = expr.logical_not(condition), b, a
    if not (isinstance(b, Const) and b.value <= MASK_LEVEL and not has_score(condition)):
        return Logits(z)
    inner = separate(a)
    if inner.keep == expr.TRUE:
        return Logits(inner.score, condition, float(b.value), additive=False)
    if math.isinf(inner.fill) and math.isinf(b.value):
        return Logits(inner.score, expr.logical_and(inner.keep, condition), -math.inf, inner.additive)
    if inner.fill == b.value and not inner.additive:
        return Logits(inner.score, expr.logical_and(inner.keep, condition), inner.fill, additive=False)
    return Logits(z)


def _added(scored: Expr, other: Expr) -> Logits:
    inner, mask = separate(scored), masked_bias(other)
    bias = mask.score
    score = inner.score if expr.is_number(bias, 0) else expr.call("add", inner.score, bias, dtype=torch.float32)
    if inner.keep == expr.TRUE:
        return Logits(score, mask.keep, mask.fill, additive=True)
    if mask.keep == expr.TRUE:
        # (keep ? s : fill) + bias: for a replaced finite fill the bias also shifts the masked scores, which only an infinite or
        # a hopelessly low fill forgets.
        if math.isinf(inner.fill) or inner.additive:
            return Logits(score, inner.keep, inner.fill, inner.additive)
        return Logits(expr.call("add", scored, other, dtype=torch.float32))
    if math.isinf(inner.fill) and math.isinf(mask.fill):
        return Logits(score, expr.logical_and(inner.keep, mask.keep), -math.inf, additive=True)
    # Two finite fills add up where both masks apply: keep the outer one as a mask, the inner one as a term of the score.
    return Logits(expr.call("add", scored, bias, dtype=torch.float32), mask.keep, mask.fill, additive=True)


def masked_bias(m: Expr) -> Logits:
    """An additive term as bias and mask: ``where(keep, bias, low)``, ``(1 - keep) * low``, sums and casts of these."""
    if isinstance(m, Call) and m.op == "cast" and m.dtype.is_floating_point:
        inner = masked_bias(m.args[0])
        return Logits(expr.cast(inner.score, m.dtype), inner.keep, _in_dtype(inner.fill, m.dtype), True)
    if isinstance(m, Call) and m.op == "where":
        condition, a, b = m.args
        if isinstance(a, Const) and a.value <= MASK_LEVEL:
            condition, a, b = expr.logical_not(condition), b, a
        if isinstance(b, Const) and b.value <= MASK_LEVEL:
            inner = masked_bias(a)
            if inner.keep == expr.TRUE or math.isinf(b.value):
                keep = expr.logical_and(inner.keep, condition)
                if inner.keep == expr.TRUE or math.isinf(inner.fill):
                    return Logits(inner.score, keep, float(b.value), True)
    if isinstance(m, Call) and m.op == "add":
        left, right = masked_bias(m.args[0]), masked_bias(m.args[1])
        if (left.keep == expr.TRUE) != (right.keep == expr.TRUE) or (math.isinf(left.fill) and math.isinf(right.fill)):
            masked = right if left.keep == expr.TRUE else left
            return Logits(expr.add(left.score, right.score, m.dtype), expr.logical_and(left.keep, right.keep), masked.fill, True)
    if isinstance(m, Call) and m.op == "mul":
        for x, low in (m.args, m.args[::-1]):
            inside = _complement(x)
            if isinstance(low, Const) and low.value <= MASK_LEVEL and inside is not None and math.isfinite(low.value):
                return Logits(expr.constant(0.0, m.dtype), inside, float(low.value), True)
    return Logits(m)


def _complement(x: Expr) -> Expr | None:
    """``keep`` where ``x`` is ``1 - keep`` or ``not keep`` as a number."""
    if isinstance(x, Call) and x.op == "cast" and x.args[0].dtype == torch.bool:
        return expr.logical_not(x.args[0])
    if isinstance(x, Call) and x.op == "sub" and expr.is_number(x.args[0], 1):
        inner = x.args[1]
        if isinstance(inner, Call) and inner.op == "cast" and inner.args[0].dtype == torch.bool:
            return inner.args[0]
    return None


def _scaled(z: Call) -> Logits:
    factor = z.args[1]
    assert isinstance(factor, Const)
    inner = separate(z.args[0])
    if factor.value == 0:
        return Logits(z)
    c = float(factor.value) if z.op == "mul" else 1.0 / float(factor.value)
    if inner.keep != expr.TRUE and not (c > 0 and (math.isinf(inner.fill) or inner.fill * c <= MASK_LEVEL)):
        return Logits(z)
    score = expr.call(z.op, inner.score, factor, dtype=torch.float32)
    fill = _in_dtype(inner.fill * c, z.dtype) if inner.keep != expr.TRUE else inner.fill
    return Logits(score, inner.keep, fill, inner.additive)


def _in_dtype(value: float, dtype: torch.dtype) -> float:
    rounded = expr.constant(value, dtype)
    assert isinstance(rounded, Const)
    return float(rounded.value)
