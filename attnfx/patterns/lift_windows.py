"""Lifting rules of views that read memory by strides: sliding windows and ``as_strided``."""

from __future__ import annotations

from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import sizes
from attnfx.patterns.lift import Index, Lifter, position_rule
from attnfx.patterns.lift_moves import argument, integer_of
from attnfx.patterns.lift_reshapes import reshaped


@position_rule("aten.unfold")
def _unfold(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, step = node.args[0], integer_of(argument(node, 3, "step"))
    d = int(argument(node, 1, "dimension")) % (len(index) - 1)
    return lifter.element(source, (*index[:d], index[d] * Int(step) + index[-1], *index[d + 1 : -1]))


@position_rule("aten.as_strided")
def _as_strided(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Of a contiguous tensor that has its memory for itself: the place in memory is the place among its elements."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    tensor, offset = source.meta["val"], argument(node, 3, "storage_offset")
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    if not (tensor.is_contiguous() and alone):
        return None
    place: Expr = Int(integer_of(0 if offset is None else offset))
    for at, stride in zip(index, argument(node, 2, "stride"), strict=True):
        place = expr.add(place, expr.mul(at, Int(integer_of(stride))))
    shape = sizes(source)
    count = integer_of(tensor.numel())
    return lifter.element(source, reshaped(lifter, shape, [count], (place,)) if shape else ())
