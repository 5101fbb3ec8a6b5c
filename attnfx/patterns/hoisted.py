"""Logits in pieces, with what the pieces share said once: a bias that all of them add to the scores, one mask with one fill."""

from __future__ import annotations

from attnfx import expr
from attnfx.expr import Call, Const, Expr, Load
from attnfx.patterns.lift import Dot


def hoisted(e: Expr, dot: Dot) -> Expr:
    """``e`` with choices between two readings of the product ``dot`` moved inwards. Each element is computed as before."""
    if not (isinstance(e, Call) and e.op == "where" and all(_holds(a, dot) for a in e.args[1:])):
        return e
    return _chosen(e.args[0], hoisted(e.args[1], dot), hoisted(e.args[2], dot), dot)


def _holds(e: Expr, dot: Dot) -> bool:
    return any(isinstance(n, Load) and n.slot == dot for n in expr.walk(e))


def _chosen(condition: Expr, a: Expr, b: Expr, dot: Dot) -> Expr:
    """``where(condition, a, b)``."""
    if a == b or a.dtype != b.dtype:
        return expr.where(condition, a, b)
    (keep, x, fill), (other, y, level) = _masked(a, dot), _masked(b, dot)
    if fill is not None or level is not None:
        if fill is None or level is None or fill == level:
            either = expr.logical_or(expr.logical_and(condition, keep), expr.logical_and(expr.logical_not(condition), other))
            low = level if fill is None else fill
            assert low is not None
            return expr.where(either, _chosen(condition, x, y, dot), low, a.dtype)
    elif isinstance(a, Call) and isinstance(b, Call) and a.op == b.op == "add":
        for shared in a.args:
            rest = [next((t for t in sum_.args if t != shared), None) for sum_ in (a, b)]
            first, second = rest
            if not _holds(shared, dot) or shared not in b.args or first is None or second is None:
                continue
            if first.dtype == second.dtype and not _holds(first, dot) and not _holds(second, dot):
                return expr.call("add", shared, expr.where(condition, first, second), dtype=a.dtype)
    return expr.where(condition, a, b)


def _masked(e: Expr, dot: Dot) -> tuple[Expr, Expr, Const | None]:
    """``keep, x, fill`` where ``e`` is x where keep and a number elsewhere; TRUE, ``e`` and None where it is not."""
    if isinstance(e, Call) and e.op == "where":
        condition, a, b = e.args
        if isinstance(a, Const):
            condition, a, b = expr.logical_not(condition), b, a
        if isinstance(b, Const) and _holds(a, dot) and not _holds(condition, dot) and a.dtype == e.dtype:
            return condition, a, b
    return expr.TRUE, e, None
