"""Contractions: every operation that sums products of two tensors over one shared axis, by what its operands' axes mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.integers import floordiv
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import is_tensor, sizes
from attnfx.patterns.equations import letters
from attnfx.patterns.lift import Dot, Index, Lifter, operation, rule
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.order import SHORT

Side = tuple[fx.Node, Index]


@dataclass(frozen=True)
class Contraction:
    """``node[index] = sum_t left[..] right[..]`` (before any scaling that the node does as well)."""

    node: fx.Node
    left: fx.Node
    right: fx.Node

    def sides(self, index: Index, t: Expr) -> tuple[Side, Side]:
        """Both operands with the index at which result ``index`` and summation index ``t`` read them."""
        name = operation(self.node)
        if name == "aten.einsum":
            a, b, out = _letters(self.node)
            at = dict(zip(out, index, strict=True))
            left, right = (tuple(at.get(x, t) for x in given) for given in (a, b))
            return (self.left, _within(self.left, left)), (self.right, _within(self.right, right))
        if name == "aten.scaled_dot_product_attention":
            left, right = _broadcast(self.left, index[:-2]), _broadcast(self.right, _key_heads(self.node, index[:-2]))
            return (self.left, (*left, index[-2], t)), (self.right, (*right, index[-1], t))
        if name == "aten.sum":
            d = _summed_axis(self.node)
            kept = bool(argument(self.node, 2, "keepdim", False))
            whole = (*index[:d], t, *index[d + kept :])
            return (self.left, _aligned(self.left, whole)), (self.right, _aligned(self.right, whole))
        left, right = _broadcast(self.left, index[:-2]), _broadcast(self.right, index[:-2])
        return (self.left, (*left, index[-2], t)), (self.right, (*right, t, index[-1]))

    def element(self, side: int, lifter: Lifter, index: Index, t: Expr) -> Expr:
        """The element of one operand (0: left, 1: right) that result ``index`` multiplies at summation index ``t``."""
        node, at = self.sides(index, t)[side]
        return lifter.element(node, at)

    @property
    def summed(self) -> sympy.Expr:
        """The size of the summed axis."""
        if operation(self.node) == "aten.einsum":
            a, b, out = _letters(self.node)
            letter = next(x for x in a if x in b and x not in out)
            left = sizes(self.left)[a.index(letter)]
            return sizes(self.right)[b.index(letter)] if left == 1 else left
        if operation(self.node) == "aten.sum":
            return sizes(self.node.args[0])[_summed_axis(self.node)]  # type: ignore[arg-type]
        return sizes(self.left)[-1]


def contraction(node: fx.Node) -> Contraction | None:
    """``node`` as a contraction of two tensors of rank two or more, or None."""
    name = operation(node)
    if name in ("aten.matmul", "aten.bmm", "aten.mm"):
        left, right = node.args[:2]
    elif name in ("aten.baddbmm", "aten.baddbmm_"):
        left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    elif name == "aten.scaled_dot_product_attention":
        left, right = node.args[:2]
    elif name == "aten.sum":
        left, right = _multiplied(node)
    elif name == "aten.einsum" and all(_letters(node)):
        left, right = _pair(node.args[1])
    else:
        return None
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and is_tensor(left) and is_tensor(right)):
        return None
    return Contraction(node, left, right) if min(len(sizes(left)), len(sizes(right))) >= 2 else None


def _multiplied(node: fx.Node) -> tuple[Any, Any]:
    """The factors of ``(left * right).sum(dim)``, both of which have the summed axis; Nones where it is something else."""
    source, dims = node.args[0], argument(node, 1, "dim")
    if not isinstance(source, fx.Node) or operation(source) != "aten.mul" or dims is None or len(dims) != 1:
        return None, None
    left, right = source.args[:2]
    if not (is_tensor(left) and is_tensor(right)) or not node.meta["val"].is_floating_point() or left is right:
        return None, None
    back = len(sizes(source)) - _summed_axis(node)
    shared = all(len(sizes(x)) >= back and sizes(x)[-back] == sizes(source)[-back] for x in (left, right))  # type: ignore[arg-type]
    plain = node.meta["val"].dtype == source.meta["val"].dtype
    return (left, right) if shared and plain else (None, None)


def _summed_axis(node: fx.Node) -> int:
    return int(argument(node, 1, "dim")[0]) % len(sizes(node.args[0]))  # type: ignore[arg-type]


def _aligned(operand: fx.Node, index: Index) -> Index:
    """The part of an element-wise result's index that an operand has, its axes of size one read at zero."""
    return _within(operand, index[len(index) - len(sizes(operand)) :])


def _pair(operands: Any) -> tuple[Any, Any]:
    first, second = operands
    return first, second


def _letters(node: fx.Node) -> tuple[str, str, str]:
    """Both operands' letters and the result's of a two-operand einsum that sums exactly one shared letter; '' if it is not
    that."""
    found = letters(node)
    if found is None or len(found[0]) != 2:
        return "", "", ""
    (a, b), out = found
    shared = [x for x in a if x in b and x not in out]
    lost = [x for x in a + b if x not in out and x not in shared]
    return (a, b, out) if len(shared) == 1 and not lost else ("", "", "")


def _within(operand: fx.Node, index: Index) -> Index:
    """``index`` with the axes of size one, which an einsum broadcasts, read at zero."""
    return tuple(expr.integer(0) if n == 1 else x for n, x in zip(sizes(operand), index, strict=True))


def _broadcast(operand: fx.Node, batch: Index) -> Index:
    lead = sizes(operand)[:-2]
    return tuple(expr.integer(0) if n == 1 else x for n, x in zip(lead, batch[len(batch) - len(lead) :], strict=True))


def _key_heads(node: fx.Node, batch: Index) -> Index:
    """The batch index of keys and values: with ``enable_gqa`` several query heads share one key head."""
    if not argument(node, 7, "enable_gqa", False):
        return batch
    heads, shared = sizes(node.args[0])[-3], sizes(node.args[1])[-3]  # type: ignore[arg-type]
    h = batch[-1]
    assert isinstance(h, Int)
    return (*batch[:-1], Int(floordiv(h.value, sympy.cancel(heads / shared))))


@rule("aten.einsum")
def _einsum(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """A contraction; or, where nothing is summed, a permutation of one tensor or the product of two."""
    if contraction(node) is not None:
        return expr.Load(Dot(node), index, node.meta["val"].dtype)
    found = letters(node)
    operands: list[fx.Node] = list(node.args[1])  # type: ignore[arg-type]
    if found is None or len(operands) > 2 or set("".join(found[0])) != set(found[1]):
        return None
    at = dict(zip(found[1], index, strict=True))
    first, *more = (lifter.element(x, _within(x, tuple(at[c] for c in given))) for given, x in zip(found[0], operands, strict=True))
    dtype = node.meta["val"].dtype
    return first if not more else expr.mul(first, more[0], dtype) if dtype.is_floating_point else None


@rule("aten.matmul", "aten.bmm", "aten.sum")
def _dot(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return expr.Load(Dot(node), index, node.meta["val"].dtype) if contraction(node) is not None else None


@rule("aten.baddbmm", "aten.baddbmm_")
def _scaled_dot(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    dtype = node.meta["val"].dtype
    scores = expr.mul(expr.Load(Dot(node), index, dtype), _number(lifter, alpha), dtype)
    if beta == 0:
        return scores  # the input is not read: a NaN in it must not spread
    return expr.add(scores, expr.mul(lifter.broadcast(node.args[0], index), _number(lifter, beta), dtype), dtype)


def _number(lifter: Lifter, value: object) -> Expr:
    return lifter.scalar(value) if isinstance(value, fx.Node) else expr.constant(float(value), torch.float64)  # type: ignore[arg-type]


def short(dot: fx.Node) -> bool:
    """Whether a product sums so few numbers that they may be coordinates."""
    made = contraction(dot)
    return made is not None and made.summed.is_Integer and bool(made.summed <= SHORT)
