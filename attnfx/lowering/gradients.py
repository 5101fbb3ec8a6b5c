"""Gradients of side tensors: which forms of bias have one in the kernels, and how its sums become the tensor's own layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import INDEX, Call, Expr, Int, Load
from attnfx.site import SideTensor

Kind = Literal["tile", "column", "row", "diagonal"]


@dataclass(frozen=True)
class BiasGradient:
    """Side tensor ``slot`` is added to the logits with weight 1; ``axes``: what each of its axes means, "b", "h", "i", "j" or ""
    (element 0).

    ``kind``: "tile" is indexed by i and j, "column" by j, "row" by i or neither (softmax does not see it), "diagonal" by i - j.
    The two flags say that b, h do not occur, so that the gradient is a sum over them.
    """

    slot: int
    kind: Kind
    batch_broadcast: bool
    head_broadcast: bool
    axes: tuple[str, ...]


def find(score: Expr, side: Sequence[SideTensor], tables: Sequence[int]) -> tuple[BiasGradient, ...] | tuple[str, ...]:
    """The gradients that ``side`` asks for; sentences where one of them has no form that the kernels know.

    ``tables``: the slots of relative tables, which are always of the form "diagonal".
    """
    wanted = [slot for slot, tensor in enumerate(side) if tensor.requires_grad]
    terms = _terms(score)
    found, reasons = [], []
    for slot in wanted:
        uses = [n for n in expr.walk(score) if isinstance(n, Load) and n.slot == slot]
        if not uses:
            continue
        added = [t for t in terms if t == uses[0]]
        axes = tuple(_axis(x) for x in uses[0].indices) if slot not in tables else ("h" if _axis(uses[0].indices[0]) else "", "i-j")
        named = [a for a in axes if a]
        if len(uses) > 1 or len(added) != 1 or None in axes or len(named) > len(set(named)):
            reasons.append(
                f"side tensor {slot} needs a gradient and is used as {_short(uses[0])}; a gradient is computed for a tensor "
                "added once, with weight 1, and indexed by b, h, i, j themselves."
            )
        else:
            found.append(_form(slot, tuple(a or "" for a in axes)))
    return tuple(reasons) or tuple(found)


def _form(slot: int, axes: tuple[str, ...]) -> BiasGradient:
    kind: Kind = "diagonal" if "i-j" in axes else "row" if "j" not in axes else "tile" if "i" in axes else "column"
    return BiasGradient(slot, kind, "b" not in axes, "h" not in axes, axes)


def _terms(e: Expr) -> list[Expr]:
    """What is summed, each with weight 1, under casts between float types."""
    if isinstance(e, Call) and e.op == "add":
        return [t for a in e.args for t in _terms(a)]
    if isinstance(e, Call) and e.op == "sub":
        return _terms(e.args[0])
    if isinstance(e, Call) and e.op == "cast" and e.dtype.is_floating_point and e.args[0].dtype.is_floating_point:
        return _terms(e.args[0])
    return [e]


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
