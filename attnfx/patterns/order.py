"""Sums of a few floats whose order of additions is not the model's, and where that is allowed.

A sum of three or four numbers depends on the order by its last bits, and torch promises no order: its kernels for CPUs and GPUs and
what Inductor generates differ by as much. Where such a sum only moves the logits a little, its formula stands for it. Where a last
bit decides (a comparison, a rounding to whole numbers, an index, a quotient by what may cancel to nothing) the result of that
operation stays the tensor that the model computed.

While logits are lifted, such a sum stands in a cast to the type that it has (:func:`free`).
"""

from __future__ import annotations

from enum import IntEnum

import torch

from attnfx import expr
from attnfx.expr import Call, Const, Expr, Int

#: The most numbers that are added in another order.
SHORT = 4


class Accuracy(IntEnum):
    """What is known of a number beside the model's own: every bit, all but its last bits, or all but the last bits of what was
    added up for it."""

    EXACT = 0
    RELATIVE = 1
    ABSOLUTE = 2


class _Decisive(Exception):
    """A last bit decides."""


def free(e: Expr, cancels: bool = False) -> Expr:
    """``e``, a sum in an order of ours. ``cancels``: the model may be off by more than last bits where it is near zero."""
    marked = Call("cast", (e,), e.dtype)
    return Call("cast", (marked,), e.dtype) if cancels else marked


def is_free(e: Expr) -> bool:
    return isinstance(e, Call) and e.op == "cast" and e.args[0].dtype == e.dtype


def settled(e: Expr) -> Expr:
    """``e`` with its sums as they stand, once it is known that all of them may."""
    return expr.rebuild(e, lambda n: settled(n.args[0]) if isinstance(n, Call) and is_free(n) else None)


def decisive(e: Expr) -> bool:
    """Whether the last bits of a free sum in ``e`` may change more than last bits of ``e``."""
    if not any(is_free(n) for n in expr.walk(e)):
        return False
    try:
        _Judge().of(e)
    except _Decisive:
        return True
    return False


#: Functions that are steep nowhere, or only where they are large.
_SMOOTH = frozenset(("tanh", "sin", "cos", "erf", "sigmoid", "exp", "exp2"))


class _Judge:
    def __init__(self) -> None:
        self.known: dict[Expr, Accuracy] = {}

    def of(self, e: Expr) -> Accuracy:
        if e not in self.known:
            self.known[e] = self._of(e)
        return self.known[e]

    def _of(self, e: Expr) -> Accuracy:
        parts = [self.of(x) for x in expr.children(e)]
        most = max(parts, default=Accuracy.EXACT)
        if isinstance(e, Call) and is_free(e):
            plain = never_negative(e.args[0]) and not is_free(e.args[0])
            return max(most, Accuracy.RELATIVE if plain else Accuracy.ABSOLUTE)
        if most == Accuracy.EXACT:
            return most
        if not isinstance(e, Call) or not e.dtype.is_floating_point:
            raise _Decisive
        return self._after(e, parts, most)

    def _after(self, e: Call, parts: list[Accuracy], most: Accuracy) -> Accuracy:
        relative = most == Accuracy.RELATIVE
        match e.op:
            case "cast" | "neg" | "abs" | "mul" | "min" | "max":
                return most
            case "add" if relative and all(map(never_negative, e.args)):
                return most
            case "add" | "sub":
                return Accuracy.ABSOLUTE
            case "where" if parts[0] == Accuracy.EXACT:
                return most
            case "div" if parts[1] != Accuracy.ABSOLUTE or at_least_one(e.args[1]):
                return most
            case "pow" if parts[1] == Accuracy.EXACT and (relative or whole_power(e) or at_least_one(e.args[0])):
                return most
            case "sqrt" | "rsqrt" if relative or at_least_one(e.args[0]):
                return most
            case "log" | "log2" if relative or at_least_one(e.args[0]):
                return Accuracy.ABSOLUTE
            case "log1p" if never_negative(e.args[0]):
                return Accuracy.ABSOLUTE
            case op if op in _SMOOTH:
                return Accuracy.ABSOLUTE
        raise _Decisive


def whole_power(e: Call) -> bool:
    """Whether ``e`` is a second, third or fourth power."""
    power = e.args[1].value if isinstance(e.args[1], Const | Int) else None
    return power in (1, 2, 3, 4)


def at_least_one(e: Expr) -> bool:
    """Whether ``e`` is proved not to be below one (it may be a NaN): roots, logarithms and quotients are not steep there."""
    if isinstance(e, Const):
        return e.value >= 1
    if not isinstance(e, Call) or e.op not in ("add", "max", "cast"):
        return False
    rest = e.op != "add" or all(map(never_negative, e.args))
    return rest and e.dtype.is_floating_point and any(map(at_least_one, e.args))


def never_negative(e: Expr) -> bool:
    """Whether ``e`` is proved to be no negative number (it may be a NaN)."""
    if e.dtype in (torch.bool, torch.uint8):
        return True
    if isinstance(e, Const):
        return e.value >= 0
    if isinstance(e, Int):
        return bool(e.value.is_nonnegative)
    if not isinstance(e, Call):
        return False
    match e.op:
        case "abs" | "exp" | "exp2" | "sigmoid" | "sqrt" | "rsqrt":
            return True
        case "mul" if e.args[0] == e.args[1]:
            return True
        case "pow" if whole_power(e):
            return expr.is_number(e.args[1], 2) or expr.is_number(e.args[1], 4) or never_negative(e.args[0])
        case "cast" | "add" | "mul" | "div" | "min":
            return all(map(never_negative, e.args))
        case "max":
            return any(map(never_negative, e.args))
        case "where":
            return all(map(never_negative, e.args[1:]))
    return False
