"""Value numbers: which nodes of a mirror hold the same value because they do the same thing to the same operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfx.graphs.mirror import Mirror


class ValueNumbers:
    """Numbers of nodes, equal only for equal values: written memory and random operations are equal to nothing but themselves."""

    def __init__(self, mirror: Mirror) -> None:
        self._written = {storage for _, storage in mirror.mutations}
        self._mirror = mirror
        self._numbers: dict[fx.Node, int] = {}
        self._known: dict[Any, int] = {}
        for node in mirror.graph.nodes:
            key = self._key(node)
            self._numbers[node] = self._known.setdefault(key, len(self._known))

    def __call__(self, node: fx.Node) -> int:
        return self._numbers[node]

    def _key(self, node: fx.Node) -> Any:
        target = node.target
        if node.op == "get_attr":
            return ("get_attr", target)
        plain = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
        if not plain or torch.Tag.nondeterministic_seeded in target.tags or self._mirror.storage.get(node) in self._written:  # type: ignore[union-attr]
            return node
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: ("node", self._numbers[n]), (tuple(node.args), dict(node.kwargs)))
        return (str(target), repr(args), repr(sorted(kwargs.items())))
