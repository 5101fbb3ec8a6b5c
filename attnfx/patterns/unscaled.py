"""Queries and keys before multiplications by numbers and widening casts, which the score takes over."""

from __future__ import annotations

import torch
from torch import fx

from attnfx.graphs.mirror import sizes
from attnfx.patterns.axes import Operand, through_scaling
from attnfx.patterns.lift import Lifter, operation
from attnfx.patterns.versions import as_read, hidden_by, obtainable


def unscaled(lifter: Lifter, operand: Operand, until: fx.Node, values: torch.dtype) -> tuple[Operand, float]:
    """The operand as it was before, still to be had at ``until``, and the product of the numbers. ``values``: the dtype of
    what the weights are multiplied with."""
    scale = 1.0
    while True:
        node, scale_before = operand.node, scale
        if lifter.severed(node) or operand.after is not node:
            return operand, scale
        if (
            (found := through_scaling(node)) is not None
            and sizes(found[0]) == sizes(node)
            and found[0].meta["val"].dtype == node.meta["val"].dtype
        ):
            older, scale = found[0], scale * found[1]
        elif operation(node) in ("aten.to", "aten._to_copy") and _widens(node, values):
            older = node.args[0]  # type: ignore[assignment]
        else:
            return operand, scale
        past = as_read(lifter.mirror, older, node)
        hidden = hidden_by(lifter.mirror, past, until)
        if hidden is not None or not obtainable(lifter.mirror, past, until):
            return operand, scale_before
        operand = Operand(older, operand.axes, past.after)


def _widens(node: fx.Node, values: torch.dtype) -> bool:
    """A cast of halves to float32 whose result is only multiplied: the products are the same without it, where
    values are halves too."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    same = source.meta["val"].device == node.meta["val"].device
    return same and bool(source.meta["val"].dtype == values) and values.itemsize == 2 and node.meta["val"].dtype == torch.float32
