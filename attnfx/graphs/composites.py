"""Composite operations that hold an attention inside one Dynamo node: taken apart first, so that the attention is a
value of the graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnfx.graphs.capture import opaque
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.lift import operation

_ATTENTION = ("aten.scaled_dot_product_attention", "aten.softmax", "aten._softmax")
_SIMPLE = ("softmax", "scaled_dot_product_attention")


def expand_composites(gm: fx.GraphModule, mirror: Mirror) -> bool:
    """Take apart, in place, every Dynamo node with an attention inside; whether anything changed (the mirror is then out
    of date)."""
    changed = False
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _LAYERS:
            _replace_by_function(gm, node, _LAYERS[node.target])
            changed = True
    return _inline_composites(gm, mirror) or changed


def _inline_composites(gm: fx.GraphModule, mirror: Mirror) -> bool:
    inside: dict[fx.Node, list[fx.Node]] = {}
    for node in mirror.graph.nodes:
        if node in mirror.origin and node.op != "placeholder":
            inside.setdefault(mirror.origin[node], []).append(node)
    changed, inlined = False, _Inliner(gm, mirror)
    for dynamo, made in inside.items():
        name = dynamo.target if isinstance(dynamo.target, str) else getattr(dynamo.target, "__name__", "")
        if len(made) > 3 and name not in _SIMPLE and any(operation(m) in _ATTENTION for m in made):
            changed |= inlined.replace(dynamo, made)
    return changed


class _Inliner:
    """Replaces Dynamo nodes by the ATen operations that they are made of."""

    def __init__(self, gm: fx.GraphModule, mirror: Mirror) -> None:
        self.graph, self.mirror = gm.graph, mirror
        alive = set(gm.graph.nodes)
        self.known: dict[fx.Node, Any] = {m: d for d, m in mirror.value.items() if d in alive}
        self.made: list[fx.Node] = []

    def replace(self, dynamo: fx.Node, made: list[fx.Node]) -> bool:
        """Whether ``dynamo``, which returns a tensor or a tuple of tensors (or None), was replaced; else nothing changed."""
        results = self.mirror.results.get(dynamo, self.mirror.value.get(dynamo))
        if results is None:
            return False
        before, self.made = dict(self.known), []
        try:
            with self.graph.inserting_before(dynamo):
                for m in made:
                    self.copy(m, dynamo)
                picked = pytree.tree_map_only(fx.Node, lambda m: self.value(m, dynamo), results)
        except LookupError:
            for node in reversed(self.made):
                self.graph.erase_node(node)
            self.known = before
            return False
        for user in list(dynamo.users):
            if user.target is operator.getitem and isinstance(picked, tuple):
                user.replace_all_uses_with(picked[int(str(user.args[1]))])
                self.graph.erase_node(user)
        if isinstance(picked, fx.Node):
            dynamo.replace_all_uses_with(picked)
        if not dynamo.users:
            self.graph.erase_node(dynamo)
        return True

    def copy(self, m: fx.Node, dynamo: fx.Node) -> fx.Node:
        args, kwargs = pytree.tree_map_only(fx.Node, lambda a: self.value(a, dynamo), (tuple(m.args), dict(m.kwargs)))
        node = self.graph.call_function(m.target, args, kwargs)  # type: ignore[arg-type]
        node.meta = {k: v for k, v in dynamo.meta.items() if k != "example_value"}
        self.made.append(node)
        self.known[m] = node
        return node

    def value(self, m: fx.Node, dynamo: fx.Node) -> Any:
        """The node that holds a mirror node's value; one that another operation computed on its way is computed again."""
        if m in self.known and (self.known[m] in self.made or self.known[m] < dynamo):
            return self.known[m]
        if m.op != "call_function" or str(m.target).rsplit(".", 1)[0].endswith("_") or m.target is opaque:
            raise LookupError(m.name)
        return self.copy(m, dynamo)


def _replace_by_function(gm: fx.GraphModule, node: fx.Node, function: Callable[..., Any]) -> None:
    """Put the operations of ``function``, called with the node's arguments, in the place of ``node``."""
    arguments = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(node):
        result = function(**{k: fx.Proxy(v, tracer) if isinstance(v, fx.Node) else v for k, v in arguments.items()})
    for made in set(gm.graph.nodes) - before:
        made.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})
    node.replace_all_uses_with(result.node)
    gm.graph.erase_node(node)


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor, mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """What ``torch._transformer_encoder_layer_fwd`` computes, src (B, S, E): the fast path of nn.TransformerEncoderLayer
    in evaluation."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        heads: Any = F.linear(x, qkv_weight, qkv_bias)
        heads = heads.unflatten(-1, (3, num_heads, embed_dim // num_heads)).permute(2, 0, 3, 1, 4)
        if mask is None:
            out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        else:  # the fast path gives NaN to a query without keys
            scores = torch.matmul(heads[0], heads[1].transpose(2, 3)) * (embed_dim // num_heads) ** -0.5
            out = torch.matmul(scores.masked_fill(_masked(mask, mask_type), float("-inf")).softmax(-1), heads[2])
        return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def _masked(mask: Any, mask_type: int | None) -> Any:
    """The fast path's mask, non-zero where a key is masked: type 0 is an S x S mask, 1 key padding (B, S), 2 both (B, H, S, S)."""
    masked = mask.to(torch.bool)
    return masked[:, None, None, :] if mask_type == 1 else masked


_LAYERS = {torch._transformer_encoder_layer_fwd: encoder_layer}
