"""Lifting rules of operations that look elsewhere: indexing, embedding, gather, concatenation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import as_sympy, sizes
from attnfx.patterns.lift import Index, Lifter, rule
from attnfx.patterns.lift_moves import argument, integer_of


def _axis(dim: Any, index: Index) -> int:
    return int(dim) % len(index)


@rule("aten.embedding")
def _embedding(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    weight, ids = node.args[:2]
    plain = argument(node, 2, "padding_idx", -1) < 0 and not argument(node, 3, "scale_grad_by_freq", False)
    assert isinstance(weight, fx.Node)
    if not plain and lifter.mirror.requires_grad(weight) and lifter.mirror.requires_grad(node):
        return None  # its gradient is not that of a lookup
    return lifter.element(weight, (lifter.element(ids, index[:-1]), index[-1]))


@rule("aten.index_select")
def _index_select(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, dim, ids = node.args[:3]
    d = _axis(dim, index)
    return lifter.element(source, (*index[:d], lifter.element(ids, (index[d],)), *index[d + 1 :]))


@rule("aten.gather")
def _gather(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, dim, ids = node.args[:3]
    d = _axis(dim, index)
    return lifter.element(source, (*index[:d], lifter.element(ids, index), *index[d + 1 :]))


@rule("aten.index")
def _index(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Advanced indexing with integer tensors; boolean indexing has a size known only at run time and stays a leaf."""
    source, given = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    shape = sizes(source)
    given += [None] * (len(shape) - len(given))
    picks = [k for k, ids in enumerate(given) if ids is not None]
    if any(str(given[k].meta["val"].dtype) in ("torch.bool", "torch.uint8") for k in picks):
        return None
    rank = max(len(sizes(given[k])) for k in picks)
    adjacent = picks == list(range(picks[0], picks[-1] + 1))
    start = picks[0] if adjacent else 0  # numpy's rule: separated indices put their axes first
    looked, rest = index[start : start + rank], iter(index[:start] + index[start + rank :])
    where: list[Expr] = []
    for size, ids in zip(shape, given, strict=True):
        where.append(next(rest) if ids is None else wrapped(lifter, lifter.broadcast(ids, looked), size))
    return lifter.element(source, tuple(where))


def wrapped(lifter: Lifter, at: Expr, size: sympy.Expr) -> Expr:
    """An index that may be negative, counted from the end as torch does."""
    if isinstance(at, Int) and lifter.ranges.nonnegative(at.value):
        return at
    if isinstance(at, Int) and lifter.ranges.nonnegative(-1 - at.value):
        return at + Int(size)
    return expr.where(expr.lt(at, expr.integer(0)), at + Int(size), at)


@rule("aten.cat", "aten.concat")
def _cat(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    pieces: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    d = int(argument(node, 1, "dim", 0)) % len(index)
    starts = [sympy.Integer(0)]
    for piece in pieces:
        if len(sizes(piece)) != len(index):
            return None  # the legacy empty tensor of rank 1
        starts.append(starts[-1] + sizes(piece)[d])
    found: Expr | None = None
    for piece, start, end in reversed(list(zip(pieces, starts, starts[1:], strict=False))):
        inside = lifter.less(index[d], Int(end))
        if inside == expr.FALSE:
            continue
        value = lifter.element(piece, (*index[:d], index[d] - Int(start), *index[d + 1 :]))
        found = value if found is None else expr.where(inside, value, found, node.meta["val"].dtype)
    return found


@rule("aten.stack")
def _stack(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    pieces: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    d = int(argument(node, 1, "dim", 0)) % len(index)
    rest = (*index[:d], *index[d + 1 :])
    found = lifter.element(pieces[-1], rest)
    for k in reversed(range(len(pieces) - 1)):
        found = expr.where(expr.eq(index[d], expr.integer(k)), lifter.element(pieces[k], rest), found, node.meta["val"].dtype)
    return found


@rule("aten.constant_pad_nd", "aten.pad")
def _pad(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, amounts = node.args[0], [integer_of(x) for x in argument(node, 1, "pad")]
    mode, value = (argument(node, 2, "mode", "constant"), argument(node, 3, "value")) if "pad_nd" not in str(node.target) else (
        "constant", argument(node, 2, "value", 0),
    )  # fmt: skip
    if mode != "constant" or any(a.is_negative for a in amounts):
        return None
    assert isinstance(source, fx.Node)
    shape, at = sizes(source), list(index)
    inside: Expr = expr.TRUE
    for k in range(len(amounts) // 2):
        d = len(shape) - 1 - k
        at[d] = index[d] - Int(amounts[2 * k])
        inside = expr.logical_and(
            inside, lifter.less(expr.integer(-1), at[d]), lifter.less(at[d], Int(as_sympy(source.meta["val"].shape[d])))
        )
    return expr.where(inside, lifter.element(source, tuple(at)), expr.constant(value or 0, node.meta["val"].dtype))
