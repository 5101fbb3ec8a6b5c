"""torch's scaled_dot_product_attention in all its arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.candidate import Candidate
from attnfx.patterns.contraction import Contraction
from attnfx.patterns.lift import Dot, Index, Lifter, Stale, operation
from attnfx.patterns.lift_moves import argument


def find(mirror: Mirror) -> Iterator[Candidate | tuple[fx.Node, str]]:
    """Every call of scaled_dot_product_attention."""
    for node in mirror.graph.nodes:
        if operation(node) == "aten.scaled_dot_product_attention":
            rank = len(sizes(node))
            if rank < 2:
                yield node, f"its operands have rank {rank}; attention needs at least (queries, head_dim)"
                continue
            if isinstance(argument(node, 4, "dropout_p", 0.0), fx.Node):
                yield node, "its dropout is a number known only at run time"
                continue
            yield _candidate(node)


def _candidate(node: fx.Node) -> Candidate:
    value = node.args[2]
    assert isinstance(value, fx.Node)

    def probabilities(lifter: Lifter, index: Index, t: Expr) -> Expr:
        return expr.Load(node, (*index[:-1], t), torch.float32)

    def values(lifter: Lifter, index: Index, t: Expr) -> tuple[fx.Node, Index]:
        # Values share the layout of keys: let the contraction place batch and head axes.
        (_, _), (_, at) = Contraction(node, value, value).sides((*index[:-1], t), index[-1])
        return value, at

    return Candidate(
        pattern="scaled_dot_product_attention",
        normaliser=node,
        output=node,
        axis=len(sizes(node)) - 1,
        length=sizes(node.args[1])[-2],  # type: ignore[arg-type]
        summed=sizes(node.args[1])[-2],  # type: ignore[arg-type]
        logits=lambda lifter, index: _logits(lifter, node, index),
        probabilities=probabilities,
        values=values,
        empty_rows="zero",
        dropout=float(argument(node, 4, "dropout_p", 0.0)),
        consumed=frozenset([node]),
    )


def _logits(lifter: Lifter, node: fx.Node, index: Index) -> Expr:
    scale = argument(node, 6, "scale")
    if scale is None:
        width = head_dim(node)
        if not width.is_Integer or width == 0:
            raise Stale(f"its head_dim is {width}, not a number known before run time")
        scale = 1.0 / math.sqrt(int(width))
    factor = lifter.scalar(scale) if isinstance(scale, fx.Node) else expr.constant(float(scale), torch.float64)
    z = expr.mul(expr.Load(Dot(node), index, torch.float32), factor, torch.float32)
    row, column = index[-2:]
    if argument(node, 5, "is_causal", False):
        z = expr.where(expr.le(column, row), z, expr.constant(-math.inf, torch.float32))
    mask = argument(node, 3, "attn_mask")
    if not is_tensor(mask):
        return z
    at = lifter.broadcast(mask, index)
    if mask.meta["val"].dtype == torch.bool:
        return expr.where(at, z, expr.constant(-math.inf, torch.float32))
    return expr.add(z, at, torch.float32)


def head_dim(node: fx.Node) -> sympy.Expr:
    """The size of the summed axis of queries and keys."""
    return sizes(node.args[0])[-1]  # type: ignore[arg-type]
