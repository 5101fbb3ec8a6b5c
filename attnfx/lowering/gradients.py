"""Gradients of side tensors: which forms of bias have one in the kernels, and how its sums become the tensor's own layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import INDEX, Expr, Int, Load
from attnfx.site import SideTensor
from attnfx.summands import summands

Kind = Literal["tile", "column", "row", "diagonal"]


@dataclass(frozen=True)
class BiasGradient:
    """Side tensor ``slot`` is added to the logits, ``factor`` times; ``axes``: what each of its axes means, "b", "h", "i", "j"
    or "" (element 0).

    ``kind``: "tile" is indexed by i and j, "column" by j, "row" by i or neither (softmax does not see it), "diagonal" by i - j.
    The two flags say that b, h do not occur, so that the gradient is a sum over them.
    """

    slot: int
    kind: Kind
    batch_broadcast: bool
    head_broadcast: bool
    axes: tuple[str, ...]
    factor: float = 1.0


def find(score: Expr, side: Sequence[SideTensor], tables: Sequence[int]) -> tuple[BiasGradient, ...] | tuple[str, ...]:
    """The gradients that ``side`` asks for; sentences where one of them has no form that the kernels know.

    ``tables``: the slots of relative tables, which are always of the form "diagonal".
    """
    wanted = [slot for slot, tensor in enumerate(side) if tensor.requires_grad]
    parts = [(part, factor, {n for n in expr.walk(part) if isinstance(n, Load)}) for part, factor in summands(score)]
    found, reasons = [], []
    for slot in wanted:
        uses = [(part, factor) for part, factor, loads in parts if any(n.slot == slot for n in loads)]
        if not uses:
            continue
        first = uses[0][0] if isinstance(uses[0][0], Load) else None
        axes = None if first is None else _axes(first, slot in tables)
        factor = sum(c for _, c in uses)
        if axes is None or any(part != first for part, _ in uses) or not math.isfinite(factor):
            reasons.append(
                f"side tensor {slot} needs a gradient and is used as {_short(_odd(uses, axes is None))}; a gradient is "
                "computed for a tensor that is added to the scores, times a number at most, and indexed by b, h, i, j themselves."
            )
        else:
            found.append(_form(slot, axes, factor))
    return tuple(reasons) or tuple(found)


def _odd(uses: Sequence[tuple[Expr, float]], first: bool) -> Expr:
    """The use that has no form: the ``first``, or the first that differs from it."""
    return next((part for part, _ in uses if first or part != uses[0][0]), uses[0][0])


def _form(slot: int, axes: tuple[str, ...], factor: float) -> BiasGradient:
    kind: Kind = "diagonal" if "i-j" in axes else "row" if "j" not in axes else "tile" if "i" in axes else "column"
    return BiasGradient(slot, kind, "b" not in axes, "h" not in axes, axes, factor)


def _axes(load: Load, relative: bool) -> tuple[str, ...] | None:
    """What each axis of the tensor means in ``load``; None where one means nothing known or two mean the same."""
    if relative:
        return "h" if _axis(load.indices[0]) else "", "i-j"
    axes = [_axis(x) for x in load.indices]
    named = [a for a in axes if a]
    return None if None in axes or len(named) > len(set(named)) else tuple(a or "" for a in axes)


def _axis(index: Expr) -> str | None:
    """The name of an index symbol, "" for element 0, None for anything else."""
    if isinstance(index, Int):
        if index.value == 0:
            return ""
        return next((name for name, symbol in INDEX.items() if index.value == symbol), None)
    return None


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) < 200 else text[:197] + "..."


def to_layout(gradient: BiasGradient, total: Tensor, like: Tensor) -> Tensor:
    """``total``, summed as (BB, BH, ...) in the order b, h, i, j (or b, h, i - j), as the gradient of ``like``."""
    if gradient.factor != 1.0:
        total = total * gradient.factor
    order = {"tile": "bhij", "column": "bhj", "row": "bhi"}.get(gradient.kind)
    named = ["b", "h", "i-j"] if order is None else list(order)
    for axis in range(len(named) - 1, -1, -1):
        if named[axis] not in gradient.axes:
            total = total.sum(axis)
            del named[axis]
    kept = [a for a in gradient.axes if a]
    total = total.permute([named.index(a) for a in kept]).to(like.dtype)
    place = tuple(slice(0, total.shape[kept.index(a)]) if a else 0 for a in gradient.axes)
    if all(a or like.shape[d] == 1 for d, a in enumerate(gradient.axes)) and total.numel() == like.numel():
        return total.reshape(like.shape).contiguous()
    grad = torch.zeros_like(like, memory_format=torch.contiguous_format)
    grad[place] = total
    return grad
