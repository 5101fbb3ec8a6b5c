"""Weights without a softmax taken apart: a formula of the score where a predicate holds, and zero elsewhere."""

from __future__ import annotations

import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Const, Expr
from attnfx.patterns.separate import MASK_LEVEL, widened

#: Operations under which a masked score of minus infinity or of a huge negative number becomes exactly zero.
_VANISHING = ("exp", "exp2", "sigmoid")


def split_weights(w: Expr) -> tuple[Expr, Expr]:
    """``score, keep`` with ``w = keep ? score : 0`` element by element."""
    w = widened(w)
    if isinstance(w, Call):
        if w.op == "where":
            return _chosen(w)
        if w.op in ("mul", "div"):
            return _multiplied(w)
        if w.op in _VANISHING or _rectified(w):
            return _vanishing(w)
    if isinstance(w, Call) and w.op == "cast" and w.args[0].dtype == torch.bool and not has_score(w):
        return expr.constant(1.0, w.dtype), w.args[0]
    return w, expr.TRUE


def _chosen(w: Call) -> tuple[Expr, Expr]:
    condition, a, b = w.args
    if expr.is_number(a, 0) and a.dtype.is_floating_point:
        condition, a, b = expr.logical_not(condition), b, a
    if has_score(condition) or not expr.is_number(b, 0):
        return w, expr.TRUE
    score, keep = split_weights(a)
    return score, expr.logical_and(keep, condition)


def _multiplied(w: Call) -> tuple[Expr, Expr]:
    a, b = w.args
    first, kept = split_weights(a)
    if w.op == "div":
        return (expr.div(first, b, w.dtype), kept) if kept != expr.TRUE else (w, expr.TRUE)
    second, also = split_weights(b)
    if kept == expr.TRUE and also == expr.TRUE:
        return w, expr.TRUE
    if expr.is_number(second, 1):
        return first, expr.logical_and(kept, also)
    if expr.is_number(first, 1):
        return second, expr.logical_and(kept, also)
    return expr.mul(first, second, w.dtype), expr.logical_and(kept, also)


def _rectified(w: Call) -> bool:
    return w.op == "max" and len(w.args) == 2 and expr.is_number(w.args[1], 0)


def _vanishing(w: Call) -> tuple[Expr, Expr]:
    inner = w.args[0]
    if isinstance(inner, Call) and inner.op == "where":
        condition, a, b = inner.args
        if isinstance(a, Const):
            condition, a, b = expr.logical_not(condition), b, a
        low = isinstance(b, Const) and b.value <= MASK_LEVEL
        if low and not has_score(condition):
            return Call(w.op, (a, *w.args[1:]), w.dtype), condition
    return w, expr.TRUE
