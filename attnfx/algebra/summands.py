"""Sums taken apart: what an expression adds up, each part with the number that it is multiplied by."""

from __future__ import annotations

from collections.abc import Iterator

from attnfx.expr import Call, Const, Expr, Int


def summands(e: Expr, factor: float = 1.0) -> Iterator[tuple[Expr, float]]:
    """``(part, c)`` with ``e`` = the sum of ``c * part``, up to rounding, through casts between float types. A part may come
    more than once.

    >>> from attnfx.expr import Score
    >>> [(str(part), c) for part, c in summands((Score() - 2.0) * 0.5)]
    [('q·k', 0.5), ('2', -0.5)]
    """
    if isinstance(e, Call) and e.dtype.is_floating_point:
        first, *rest = e.args
        if e.op == "cast" and first.dtype.is_floating_point:
            return (yield from summands(first, factor))
        if e.op == "neg":
            return (yield from summands(first, -factor))
        if e.op in ("add", "sub"):
            yield from summands(first, factor)
            return (yield from summands(rest[0], factor if e.op == "add" else -factor))
        if e.op == "mul" and (by := number(first)) is not None:
            return (yield from summands(rest[0], factor * by))
        if e.op == "mul" and (by := number(rest[0])) is not None:
            return (yield from summands(first, factor * by))
        if e.op == "div" and (by := number(rest[0])):
            return (yield from summands(first, factor / by))
    yield e, factor


def number(e: Expr) -> float | None:
    """The value of a numeric constant, None for anything else."""
    if isinstance(e, Int):
        return float(int(e.value)) if e.value.is_Integer else None
    return float(e.value) if isinstance(e, Const) and not isinstance(e.value, bool) else None
