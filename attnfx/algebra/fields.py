"""Whether several numbers of a key all lie between two of its query, in one comparison: the numbers are fields of an int32 each.

A field has a guard bit above it. In ``place - low`` and ``high - place``, of whole int32s, nothing is borrowed from the lowest
field that is negative, so it sets its guard; if no field is negative, no guard is set (Lamport 1975, Multiple byte processing with
full-word instructions).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Call, Expr, Int

#: Bits of all fields and their guards: those of an int32 without its sign.
BITS = 31


def starts(widths: Sequence[int]) -> list[int]:
    """The lowest bit of each field, and the first bit that is free."""
    return list(itertools.accumulate((w + 1 for w in widths), initial=0))


def packed(numbers: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """One int32 of numbers from 0 on, each below 2 to its width."""
    assert starts(widths)[-1] <= BITS
    return torch.stack([x.long() << s for x, s in zip(numbers, starts(widths), strict=False)]).sum(0).int()


def inside(place: Expr, low: Expr, high: Expr, widths: Sequence[int]) -> Expr:
    """low <= place <= high in every field of three int32s."""
    guards = sum(1 << end - 1 for end in starts(widths)[1:])
    values = expr.integer((1 << starts(widths)[-1]) - 1 - guards)
    p, a, b = (expr.call("bitand", x, values, dtype=torch.int32) for x in (place, low, high))
    below = expr.call("bitor", expr.sub(p, a), expr.sub(b, p), dtype=torch.int32)
    return expr.eq(expr.call("bitand", below, expr.integer(guards), dtype=torch.int32), expr.integer(0))


def apart(e: Expr) -> Expr | None:
    """What :func:`inside` made, as comparisons of one field each; None of anything else."""
    match e:
        case Call(op="eq", args=(Call(op="bitand", args=(Call(op="bitor", args=(below, above)), Int(value=guards))), _)):
            pass
        case _:
            return None
    operands = _differing(below, above)
    if operands is None or not guards.is_Integer or guards <= 0:
        return None
    ends = [bit + 1 for bit in range(int(guards).bit_length()) if int(guards) >> bit & 1]
    widths = [end - start - 1 for start, end in itertools.pairwise((0, *ends))]
    if inside(*operands, widths) != e:
        return None
    place, low, high = ([_field(x, *at) for at in zip(starts(widths), widths, strict=False)] for x in operands)
    return expr.logical_and(*(t for p, a, b in zip(place, low, high, strict=True) for t in (expr.le(a, p), expr.le(p, b))))


def _differing(below: Expr, above: Expr) -> tuple[Expr, Expr, Expr] | None:
    """(place, low, high) of ``place & _ - low & _`` and ``high & _ - place & _``."""
    match below, above:
        case (
            Call(op="sub", args=(Call(op="bitand", args=(place, _)), Call(op="bitand", args=(low, _)))),
            Call(op="sub", args=(Call(op="bitand", args=(high, _)), _)),
        ):
            return place, low, high
    return None


def _field(x: Expr, start: int, width: int) -> Expr:
    """One field, as a number. (Its sign bit is not among the fields, so that a quotient is a shift.)"""
    held = expr.call("bitand", x, expr.integer(((1 << width) - 1) << start), dtype=torch.int32)
    return expr.call("floordiv", held, expr.integer(1 << start), dtype=torch.int32) if start else held
