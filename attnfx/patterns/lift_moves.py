"""Lifting rules of operations that only move elements: views, slices, permutations, expansions, copies."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import as_sympy, is_tensor, sizes
from attnfx.patterns.lift import Index, Lifter, _Step, expressible, operation, rule, unpacked
from attnfx.patterns.lift_reshapes import reshaped


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def integer_of(value: Any) -> sympy.Expr:
    """A Python int or a mirror node that holds one, as sympy. Raises NoNumber for one that no formula carries."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return expressible(as_sympy(value))


@rule(
    "aten.clone", "aten.contiguous", "aten.detach", "aten.detach_", "aten.alias", "aten.lift_fresh", "aten.lift_fresh_copy",
    moves=True,
)  # fmt: skip
def _same(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return lifter.element(node.args[0], index)


@rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.view_as", moves=True)
def _reshape(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if isinstance(argument(node, 1, "dtype"), torch.dtype):
        return None  # a reinterpretation of bits
    return lifter.element(source, reshaped(lifter, sizes(source), sizes(node), index))


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to", moves=True)
def _expand(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return lifter.broadcast(node.args[0], index)


@rule("aten.permute", moves=True)
def _permute(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    order = [int(d) % len(index) for d in argument(node, 1, "dims")]
    return lifter.element(node.args[0], tuple(index[order.index(d)] for d in range(len(index))))


@rule("aten.transpose", "aten.transpose_", "aten.swapaxes", "aten.swapaxes_", "aten.swapdims", "aten.swapdims_", moves=True)
def _transpose(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    a, b = (int(x) % len(index) for x in (argument(node, 1, "dim0"), argument(node, 2, "dim1")))
    moved = list(index)
    moved[a], moved[b] = moved[b], moved[a]
    return lifter.element(node.args[0], tuple(moved))


@rule("aten.t", "aten.t_", "aten.mT", "aten.matrix_H", "aten.numpy_T", moves=True)
def _flip_last(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if operation_is(node, "aten.numpy_T"):
        return lifter.element(node.args[0], index[::-1])
    return lifter.element(node.args[0], index[:-2] + index[:-3:-1]) if len(index) > 1 else lifter.element(node.args[0], index)


def operation_is(node: fx.Node, name: str) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and str(node.target.overloadpacket) == name


@rule("aten.unsqueeze", "aten.unsqueeze_", moves=True)
def _unsqueeze(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    d = int(argument(node, 1, "dim")) % len(index)
    return lifter.element(node.args[0], index[:d] + index[d + 1 :])


@rule("aten.squeeze", "aten.squeeze_", moves=True)
def _squeeze(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    dims = argument(node, 1, "dim")
    asked = (
        range(len(shape)) if dims is None else [int(d) % max(len(shape), 1) for d in ([dims] if isinstance(dims, int) else dims)]
    )
    dropped = {d for d in asked if shape[d] == 1}
    rest = iter(index)
    return lifter.element(source, tuple(expr.integer(0) if d in dropped else next(rest) for d in range(len(shape))))


@rule("aten.select", moves=True)
def _select(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    d = int(argument(node, 1, "dim")) % len(shape)
    at = integer_of(argument(node, 2, "index"))
    at = at + shape[d] if at.is_negative else at
    return lifter.element(source, (*index[:d], Int(at), *index[d:]))


@rule("aten.slice", moves=True)
def _slice(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    d = int(argument(node, 1, "dim", 0)) % len(index)
    start = argument(node, 2, "start")
    begin = integer_of(start) if start is not None else sympy.Integer(0)
    if begin.is_negative:
        begin = begin + sizes(source)[d]
    if not lifter.ranges.nonnegative(begin):
        return None
    step = integer_of(argument(node, 4, "step", 1))
    return lifter.element(source, (*index[:d], index[d] * Int(step) + Int(begin), *index[d + 1 :]))


@rule("aten.narrow", moves=True)
def _narrow(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    d = int(argument(node, 1, "dim")) % len(index)
    begin = integer_of(argument(node, 2, "start"))
    return lifter.element(node.args[0], (*index[:d], index[d] + Int(begin), *index[d + 1 :]))


@rule("aten.flip", moves=True)
def _flip(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    shape = sizes(node)
    dims = {int(d) % len(index) for d in argument(node, 1, "dims")}
    return lifter.element(node.args[0], tuple(Int(shape[d] - 1) - x if d in dims else x for d, x in enumerate(index)))


@rule("_operator.getitem", moves=True)
def _unpack(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """One of the results of split, chunk or unbind."""
    source, which = node.args
    if not (isinstance(source, fx.Node) and isinstance(which, int)):
        return None
    if not is_tensor(source.args[0] if source.args else None) or operation(source) in ("aten.max", "aten.min"):
        return None if isinstance(lifter, _Step) else unpacked(lifter, node, index)
    base = source.args[0]
    assert isinstance(base, fx.Node)
    name = str(getattr(source.target, "overloadpacket", ""))
    if name not in ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split"):
        return None
    d = int(argument(source, 1 if name == "aten.unbind" else 2, "dim", 0)) % len(sizes(base))
    if name == "aten.unbind":
        return lifter.element(base, (*index[:d], expr.integer(which), *index[d:]))
    before = sum((as_sympy(t.shape[d]) for t in source.meta["val"][:which]), sympy.Integer(0))
    return lifter.element(base, (*index[:d], index[d] + Int(before), *index[d + 1 :]))


@rule("aten.repeat_interleave", moves=True)
def _repeat_interleave(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if is_tensor(times) or (dim is None and len(sizes(node.args[0])) != 1):  # type: ignore[arg-type]
        return None
    d = 0 if dim is None else int(dim) % len(index)
    return lifter.element(node.args[0], (*index[:d], lifter.floordiv(index[d], integer_of(times)), *index[d + 1 :]))


@rule("aten.repeat", "aten.tile", moves=True)
def _repeat(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    tail = index[len(index) - len(shape) :]
    wrapped = [
        expr.integer(0) if size == 1 else lifter.modulo(x, size) if size != full else x
        for x, size, full in zip(tail, shape, sizes(node)[len(index) - len(shape) :], strict=True)
    ]
    return lifter.element(source, tuple(wrapped))
