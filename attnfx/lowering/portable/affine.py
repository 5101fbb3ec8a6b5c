"""Score programs of the form scale * dot + bias, which torch's own CPU kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Const, Expr, Int, Score, constant

ZERO = constant(0.0, torch.float32)


@dataclass(frozen=True)
class Affine:
    """``scale`` * dot + ``bias``; no bias is None."""

    scale: float
    bias: Expr | None


def affine(score: Expr) -> Affine | None:
    """The form of a widened score program, None where it has another."""
    found = _affine(score)
    return None if found is None else Affine(found[0], None if found[1] == ZERO else found[1])


def _affine(e: Expr) -> tuple[float, Expr] | None:
    if isinstance(e, Score):
        return 1.0, ZERO
    if not has_score(e):
        return 0.0, e
    if not isinstance(e, Call):
        return None
    parts = [_affine(a) for a in e.args]
    if any(p is None for p in parts):
        return None
    known = [p for p in parts if p is not None]
    if e.op in ("add", "sub"):
        (a, x), (b, y) = known
        make = expr.add if e.op == "add" else expr.sub
        if y == ZERO:
            return (a + b if e.op == "add" else a - b), x
        if x == ZERO and e.op == "add":
            return a + b, y
        return (a + b if e.op == "add" else a - b), make(x, y, torch.float32)
    return _product(e, known)


def _product(e: Call, parts: list[tuple[float, Expr]]) -> tuple[float, Expr] | None:
    """A product with a constant; a bias may be scaled too."""
    if e.op == "neg":
        return -parts[0][0], _times(parts[0][1], -1.0)
    if e.op in ("mul", "div"):
        for (scale, bias), other in ((parts[0], e.args[1]), (parts[1], e.args[0])):
            number = _number(other)
            if number is None or (e.op == "div" and (other is not e.args[1] or number == 0)):
                continue
            factor = number if e.op == "mul" else 1.0 / number
            return scale * factor, _times(bias, factor)
    return None


def _times(e: Expr, factor: float) -> Expr:
    return ZERO if e == ZERO else expr.mul(e, Const(factor, torch.float32), torch.float32)


def _number(e: Expr) -> float | None:
    if isinstance(e, Const) and e.dtype.is_floating_point:
        return float(e.value)
    return float(int(e.value)) if isinstance(e, Int) and e.value.is_Integer else None
