"""Self-attention or cross-attention: whether keys are made of the tensor that queries are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from attnfx.graphs.mirror import Mirror
from attnfx.patterns.evidence import activation

_PROJECTIONS = {"aten::linear", "aten::addmm", "aten::mm", "aten::convolution", "aten::conv1d", "aten::conv2d", "aten::conv3d"}
_MOVES = {
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::permute", "aten::transpose", "aten::t", "aten::flatten",
    "aten::unflatten", "aten::squeeze", "aten::unsqueeze", "aten::expand", "aten::slice", "aten::select", "aten::cat",
    "aten::chunk", "aten::split", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::to", "aten::alias", "aten::detach",
    "aten::dropout", "aten::split_with_sizes", "aten::unbind",
}  # fmt: skip
_MIXES = {
    "aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum", "aten::scaled_dot_product_attention", "aten::softmax",
    "aten::_softmax", "aten::embedding", "aten::gather", "aten::index", "aten::index_select",
}  # fmt: skip
"""What takes tokens from elsewhere: behind it a tensor is no longer made of the tokens that it holds."""


def relation(mirror: Mirror, query: fx.Node, key: fx.Node) -> str:
    """ "self" where keys are made of the tensor that queries are made of, "cross" where of another one, "" where it is not seen.

    The tensors are those that are projected to queries and keys: a layer of weights, or several, may stand between, and another
    attention may not.
    """
    asked, held = _projected(query), _projected(key)
    if not asked or not held:
        inputs = _inputs(mirror, query), _inputs(mirror, key)
        return "self" if inputs[0] and not inputs[0].isdisjoint(inputs[1]) else ""
    if not asked.isdisjoint(held):
        return "self"
    stems = _stems(asked)
    shared = (node for node in _behind(held, _through_weights) if node in asked or node in stems)
    return "self" if any(activation(mirror, node) for node in shared) else "cross"


def _projected(node: fx.Node) -> frozenset[fx.Node]:
    """The tensors whose projections a query or a key is made of."""
    found = (at for at in _behind([node], _through_arithmetic) if _name(at) in _PROJECTIONS or _weighted(at))
    return frozenset(root for at in found for root in _roots(_activation(at)))


def _roots(node: fx.Node) -> Iterator[fx.Node]:
    """What a tensor's elements are moved from."""
    return (at for at in _behind([node], lambda at: _name(at) in _MOVES) if _name(at) not in _MOVES)


def _stems(roots: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The tensors that `roots` are made of without a layer of weights: before a norm, or along a residual."""
    return frozenset(at for at in _behind(roots, _through_arithmetic) if _floating(at))


def _inputs(mirror: Mirror, node: fx.Node) -> frozenset[fx.Node]:
    """The activations among the graph's inputs that a tensor is made of by arithmetic alone."""
    found = (at for at in _behind([node], _through_arithmetic) if at.op == "placeholder" and _floating(at))
    return frozenset(at for at in found if activation(mirror, at))


def _behind(starts: frozenset[fx.Node] | list[fx.Node], further: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """`starts` and all behind them, as far as `further` lets through."""
    seen, queue = set(starts), list(starts)
    while queue:
        at = queue.pop()
        yield at
        if further(at):
            new = [n for n in at.all_input_nodes if n not in seen]
            seen.update(new)
            queue.extend(new)


def _through_arithmetic(node: fx.Node) -> bool:
    return _name(node) not in _PROJECTIONS and _name(node) not in _MIXES


def _through_weights(node: fx.Node) -> bool:
    return _name(node) not in _MIXES or _weighted(node)


def _weighted(node: fx.Node) -> bool:
    """Whether a product is one with a matrix, as of weights, that is the same for the whole batch."""
    if _name(node) != "aten::matmul" or len(node.all_input_nodes) != 2:
        return False
    left, right = (n.meta["val"].dim() for n in node.all_input_nodes)
    return bool(right == 2 and left > 2)


def _activation(node: fx.Node) -> fx.Node:
    """What a projection is applied to."""
    return node.all_input_nodes[1 if _name(node) == "aten::addmm" else 0]


def _name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
