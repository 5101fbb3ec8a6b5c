"""Gradients of side tensors: which forms of bias have one in the kernels, and how its sums become the tensor's own layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.nodes import has_score
from attnfx.algebra.summands import summands
from attnfx.expr import INDEX, Expr, Int, Load, Score, children
from attnfx.site import SideTensor

Kind = Literal["tile", "column", "row", "diagonal", "left", "window"]
KINDS = get_args(Kind)
#: What one axis of a side tensor means: "b", "h", "i", "j" or "i-j" themselves, "" for element 0, or a formula of b and h (an
#: axis that folds both, ``H * b + h``, or key heads, ``h // G``).
Axis = str | Int


@dataclass(frozen=True)
class BiasGradient:
    """Side tensor ``slot`` is added to the logits, ``factor`` times; ``axes``: what each of its axes means. ``inside``: it is
    added to the scores before something else is done to them (a softcap), ``factor`` times as much as q.k.

    ``kind``: "tile" is indexed by i and j, "column" by j, "row" by i or neither (softmax does not see what all keys
    of a row share), "diagonal" by i - j; "left" and "window" are the operands of a band, as they are laid out.
    The two flags say that b, h do not occur, so that the gradient is a sum over them.
    """

    slot: int
    kind: Kind
    batch_broadcast: bool
    head_broadcast: bool
    axes: tuple[Axis, ...]
    factor: float = 1.0
    inside: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ValueError(f"the factor of a gradient is {self.factor}; it is finite")


def find(
    score: Expr, side: Sequence[SideTensor], tables: Sequence[int], shared: bool
) -> tuple[BiasGradient, ...] | tuple[str, ...]:
    """The gradients that ``side`` asks for; sentences where one of them has no form that the kernels know.

    ``tables``: the slots of relative tables, which are always of the form "diagonal". ``shared``: whether what is added to the
    scores of a row is added to every key that has weight there; a finite fill that is put in place of scores is without it.
    """
    found, reasons = [], []
    for slot in (slot for slot, tensor in enumerate(side) if tensor.requires_grad and _loads(score, slot)):
        uses, unit, inside = _added(score, slot)
        first = uses[0][0] if isinstance(uses[0][0], Load) else None
        axes = None if first is None else _axes(first, slot in tables)
        factor = sum(c for _, c in uses) / unit if unit else math.nan
        if axes is None or any(part != first for part, _ in uses) or not math.isfinite(factor):
            reasons.append(
                f"side tensor {slot} needs a gradient and is used as {_short(_odd(uses, axes is None))}; a gradient is computed "
                "for a tensor added to the scores, times a number at most, and indexed by i, j themselves, b and h."
            )
        else:
            found.append(_form(slot, axes, factor, inside, shared))
    return tuple(reasons) or tuple(found)


def _added(score: Expr, slot: int) -> tuple[list[tuple[Expr, float]], float, bool]:
    """The summands of the logits that read ``slot``, and 1. Where these are summands of what a function of the scores is taken
    of: what is added there, how often q.k is (0 where it is not only multiplied by a number), and True."""
    level, inside = score, False
    while True:
        parts = list(summands(level))
        uses, scored = [p for p in parts if _loads(p[0], slot)], [p for p in parts if has_score(p[0])]
        if not any(has_score(part) for part, _ in uses):
            unit = sum(c for _, c in scored) if all(isinstance(part, Score) for part, _ in scored) else 0.0
            return uses, unit if inside else 1.0, inside
        operands = children(scored[0][0])
        holders = [a for a in operands if has_score(a)]
        if uses != scored or len(uses) != 1 or len(holders) != 1 or sum(_loads(a, slot) for a in operands) != 1:
            return uses, 0.0, inside
        level, inside = holders[0], True
        if not _loads(level, slot):
            return uses, 0.0, inside


def _loads(e: Expr, slot: int) -> bool:
    return any(isinstance(n, Load) and n.slot == slot for n in expr.walk(e))


def _odd(uses: Sequence[tuple[Expr, float]], first: bool) -> Expr:
    """The use that has no form: the ``first``, or the first that differs from it."""
    return next((part for part, _ in uses if first or part != uses[0][0]), uses[0][0])


def _form(slot: int, axes: tuple[Axis, ...], factor: float, inside: bool, shared: bool) -> BiasGradient:
    kind: Kind = "diagonal" if "i-j" in axes else "row" if "j" not in axes else "tile" if "i" in axes else "column"
    if kind == "row" and (inside or not shared):  # keys of one row differ in it
        kind = "tile" if "i" in axes else "column"
    known = {a for a in axes if isinstance(a, str)} | {n for a in axes if isinstance(a, Int) for n in "bh" if expr.depends_on(a, n)}
    return BiasGradient(slot, kind, "b" not in known, "h" not in known, axes, factor, inside)


def _axes(load: Load, relative: bool) -> tuple[Axis, ...] | None:
    """What each axis of the tensor means in ``load``; None where one means nothing known or two mean the same."""
    if relative:
        return "h" if _axis(load.indices[0]) else "", "i-j"
    axes = [_axis(x) for x in load.indices]
    named = [a for a in axes if a and isinstance(a, str)]
    known = tuple(a for a in axes if a is not None)
    return None if len(known) < len(axes) or len(named) > len(set(named)) else known


def _axis(index: Expr) -> Axis | None:
    """The name of an index symbol, "" for element 0, a formula without i and j as itself, None for anything else."""
    if not isinstance(index, Int):
        return None
    if index.value == 0:
        return ""
    plain = next((name for name, symbol in INDEX.items() if index.value == symbol), None)
    return plain or (None if expr.depends_on(index, "i", "j") else index)


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) < 200 else text[:197] + "..."


def to_layout(gradient: BiasGradient, total: Tensor, like: Tensor, values: Mapping[sympy.Symbol, int]) -> Tensor:
    """``total``, summed as (BB, BH, ...) in the order b, h, i, j (or b, h, i - j), as the gradient of ``like``.

    ``values``: what the plan's size symbols are. Where several b, h share an element of ``like``, these are added up.
    """
    if gradient.kind in ("left", "window"):
        return total.to(like.dtype)
    if gradient.factor != 1.0:
        total = total * gradient.factor
    named = ["b", "h", *{"tile": ("i", "j"), "column": ("j",), "row": ("i",), "diagonal": ("i-j",)}[gradient.kind]]
    axes = [a if isinstance(a, str) else "" for a in gradient.axes]
    if any(isinstance(a, Int) for a in gradient.axes):
        folded = [d for d, a in enumerate(gradient.axes) if isinstance(a, Int) or a in ("b", "h")]
        total, named = _spread(gradient, total, like, folded, values), [*(f"axis {d}" for d in folded), *named[2:]]
        axes = [f"axis {d}" if d in folded else a for d, a in enumerate(axes)]
    for axis in range(len(named) - 1, -1, -1):
        if named[axis] not in axes:
            total = total.sum(axis)
            del named[axis]
    kept = [a for a in axes if a]
    total = total.permute([named.index(a) for a in kept]).to(like.dtype)
    place = tuple(slice(0, total.shape[kept.index(a)]) if a else 0 for a in axes)
    if all(a or like.shape[d] == 1 for d, a in enumerate(axes)) and total.numel() == like.numel():
        return total.reshape(like.shape).contiguous()
    grad = torch.zeros_like(like, memory_format=torch.contiguous_format)
    grad[place] = total
    return grad


def _spread(gradient: BiasGradient, total: Tensor, like: Tensor, axes: Sequence[int], values: Mapping[sympy.Symbol, int]) -> Tensor:
    """``total`` with its b and h, (BB, BH, ...), replaced by those ``axes`` of ``like`` that b and h choose an element of."""
    grid = {
        "b": torch.arange(total.shape[0], device=total.device)[:, None],
        "h": torch.arange(total.shape[1], device=total.device),
    }
    at = torch.zeros(total.shape[:2], dtype=torch.int64, device=total.device)
    for d in axes:
        axis = gradient.axes[d]
        at = at * like.shape[d] + evaluate(Int(INDEX[axis]) if isinstance(axis, str) else axis, grid, (), values)
    sizes = [like.shape[d] for d in axes]
    flat = total.flatten(0, 1)
    summed = flat.new_zeros(math.prod(sizes), *flat.shape[1:]).index_add_(0, at.flatten(), flat)
    return summed.view(*sizes, *flat.shape[1:])
