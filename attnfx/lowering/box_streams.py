"""Descriptors of tiles that are boxes of a layout: the copy engine reads tokens in an order (:mod:`attnfx.sites.ordering`).

A descriptor has five axes at most: batch, head, two axes of the layout and the width; of a layout of three axes the first one and
the batch are one, where the strides allow it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnfx.lowering.configs import Config, padded
from attnfx.lowering.descriptors import serves
from attnfx.sites.ordering import Order, Side

#: Tokens of the tiles that lists name, for which the axes are chosen.
TILE = 64


def sides(order: Order) -> tuple[Side, ...] | None:
    """The axes of a layout along which tiles are boxes; None where they are none, or have too many."""
    found = order.boxes(TILE)
    return found if found is not None and len(found) in (2, 3) else None


def described(target: str, config: Config, order: Order, tensors: Sequence[Tensor]) -> tuple[TensorDescriptor, ...] | None:
    """Descriptors of q, k and v (B,H,N,D); None where the tiles of a configuration are no boxes, or a tensor can have none."""
    whole = sides(order)
    if whole is None or not config.tma:
        return None
    found = []
    for x, rows in zip(tensors, (config.block_m, config.block_n, config.block_n), strict=True):
        own = order.boxes(rows)
        if own is None or [(s.length, s.digits) for s in own] != [(s.length, s.digits) for s in whole]:
            return None
        if not serves(target, x) or not _room(x, own):
            return None
        found.append(_described(x, own))
    return tuple(found)


def _room(x: Tensor, own: tuple[Side, ...]) -> bool:
    """Whether the first of three axes and the batch are one."""
    return len(own) == 2 or x.shape[0] == 1 or x.stride(0) == own[0].length * own[0].step * x.stride(2)


def _described(x: Tensor, own: tuple[Side, ...]) -> TensorDescriptor:
    (batch, heads, _, width), token = x.shape, x.stride(2)
    lengths, steps, boxes = [s.length for s in own], [s.step * token for s in own], [s.box for s in own]
    if len(own) == 3:
        first = batch * lengths.pop(0), steps.pop(0), boxes.pop(0)
    else:
        first = batch, x.stride(0) if batch > 1 else width, 1
    shape = [first[0], heads, *lengths, width]
    strides = [first[1], x.stride(1) if heads > 1 else width, *steps, 1]
    return TensorDescriptor(x, shape, strides, [first[2], 1, *boxes, padded(width)])
