"""Near misses that no pattern took up: a product of two activations, normalised, that meets a third one further on.

The patterns follow what a formula can hold. What lies outside (heads mixed by a linear layer, probabilities that leave the
graph, chunked exponentials) is looked for here by descent alone, so that the report can say what stood in the way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import fx

from attnfx.graphs.mirror import Mirror, is_tensor
from attnfx.patterns.contraction import contraction
from attnfx.patterns.lift import has_rule, operation

_NORMALISERS = ("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.exp", "aten.exp2", "aten.log_softmax")
#: Maps over all channels: scores survive one of them (heads that are mixed), never two (then it is a layer of the model).
_MAPS = ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.addmm", "aten.matmul", "aten.bmm",
         "aten.mm", "aten.einsum", "aten.baddbmm", "aten.layer_norm", "aten.batch_norm", "aten.group_norm")  # fmt: skip
_ENDS = frozenset(
    f"aten.{name}"
    for name in ("sum", "mean", "amax", "max", "argmax", "topk", "sort", "logsumexp", "embedding", "scaled_dot_product_attention",
                 "cumsum", "any", "all", "norm")
)  # fmt: skip


def lookalikes(mirror: Mirror, known: Collection[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Every normaliser outside ``known`` whose scores are a product of activations and whose results meet the values, with
    the reason why no pattern took it up."""
    family = _Family(mirror)
    scores = family.descent([n for n in mirror.graph.nodes if family.product(n)])
    told = set(known)
    for node in mirror.graph.nodes:
        if operation(node) not in _NORMALISERS or node in told or node.args[0] not in scores:
            continue
        reached = family.descent([node])
        if told & reached.keys():
            continue  # a part of a normaliser that is told of
        met = next((user for n in reached for user in n.users if family.meets(user, reached)), None)
        leaving = next((n for n in reached if mirror.leaves_graph(n)), None)
        if met is not None:
            told |= reached.keys()
            yield node, _between(mirror, node, met, reached)
        elif leaving is not None and "softmax" in operation(node) and reached[leaving] == 0:
            yield node, f"its probabilities ({leaving.name}) leave the graph before the values are summed"


class _Family:
    """Who comes of whom in a mirror, as far as attention goes."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.activations: set[fx.Node] = set()
        for node in mirror.graph.nodes:
            computed = operation(node) in _MAPS or any(n in self.activations for n in node.all_input_nodes)
            if computed or (node.op == "placeholder" and is_tensor(node) and not self._parameter(node)):
                self.activations.add(node)

    def _parameter(self, node: fx.Node) -> bool:
        origin = self.mirror.origin.get(node)
        return origin is not None and isinstance(origin.meta.get("example_value"), torch.nn.Parameter)

    def product(self, node: fx.Node) -> bool:
        """Whether ``node`` multiplies two activations."""
        made = contraction(node)
        return made is not None and made.left in self.activations and made.right in self.activations

    def descent(self, sources: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """What comes of ``sources`` through at most one map over channels, with the number of maps on the way."""
        maps = dict.fromkeys(sources, 0)
        for node in self.mirror.graph.nodes:
            above = [maps[n] for n in node.all_input_nodes if n in maps]
            if node in maps or not above or operation(node) in _ENDS or self.product(node) or node.op == "output":
                continue
            hops = min(above) + (operation(node) in _MAPS)
            if hops <= 1:
                maps[node] = hops
        return maps

    def meets(self, node: fx.Node, reached: Mapping[fx.Node, int]) -> bool:
        """Whether ``node`` multiplies something of ``reached`` with an activation outside of it."""
        made = contraction(node)
        return made is not None and self.product(node) and (made.left in reached) != (made.right in reached)


def _between(mirror: Mirror, node: fx.Node, end: fx.Node, reached: Mapping[fx.Node, int]) -> str:
    """What lies between a normaliser and the product with the values that no formula holds."""
    if "softmax" not in operation(node):
        return f"an exponential of its scores meets the values ({end.name}) without the sum over all keys beside it"
    leading = {end}
    for n in sorted(reached, key=lambda n: -mirror.position[n]):
        if any(user in leading for user in n.users):
            leading.add(n)
    for n in sorted(leading - {node, end}, key=lambda n: mirror.position[n]):
        if not has_rule(n):
            return f"between its probabilities and the values lies {operation(n)} ({n.name})"
    return "its scores or probabilities are changed in a way that is not an attention's"
