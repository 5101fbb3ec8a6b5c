"""Lifting through functions that an operator calls on single elements: their parameters are bound to expressions or tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfx import expr
from attnfx.expr import Expr, Load
from attnfx.graphs.callees import Subgraph, derive
from attnfx.graphs.mirror import is_tensor
from attnfx.patterns.candidate import Refused
from attnfx.patterns.lift import Dot, Index, Lifter, Stale

#: What a parameter of a subgraph stands for: an element of a fused loop, or a tensor or number of the graph around.
Bound = Mapping[fx.Node, Expr | fx.Node]


def lifted(outer: Lifter, inner: Subgraph, bound: Bound, made: Callable[[fx.Node], fx.Node]) -> Expr:
    """The result of ``inner`` as an expression over the nodes of the graph around it.

    What has no formula and depends on whole tensors only is computed once by that graph (``made``, see :func:`grafts`). Raises
    Refused where something without a formula depends on the element.
    """
    found = _Inner(outer, inner, bound).element(inner.result, ())
    return _grounded(found, inner, made)


def grafts(outer_mirror: Any, inner: Subgraph, bound: Bound, at: fx.Node) -> Callable[[fx.Node], fx.Node]:
    """What makes nodes of ``inner`` that read nothing of the element into nodes of the graph around, at ``at``."""
    known: dict[fx.Node, fx.Node] = {}

    def made(node: fx.Node) -> fx.Node:
        if node not in known:
            known[node] = _graft(node)
        return known[node]

    def _graft(node: fx.Node) -> fx.Node:
        if node in bound:
            outside = bound[node]
            if isinstance(outside, fx.Node):
                return outside
            raise Refused("it depends on the score or on its position")
        if not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(node):
            raise Refused(f"{node.name} cannot be computed outside of it")
        args, kwargs = pytree.tree_map_only(fx.Node, made, (tuple(node.args), dict(node.kwargs)))
        return derive(outer_mirror, at, node.target, *args, **kwargs)

    return made


class _Inner(Lifter):
    """A lifter inside a subgraph whose parameters are known to the graph around."""

    def __init__(self, outer: Lifter, inner: Subgraph, bound: Bound) -> None:
        super().__init__(inner.mirror, outer.ranges, at=inner.result)
        self.outer, self.bound = outer, bound

    def element(self, node: Any, index: Index) -> Expr:
        outside = self.bound.get(node) if isinstance(node, fx.Node) else None
        if outside is None:
            return super().element(node, index)
        return self.outer.element(outside, index) if isinstance(outside, fx.Node) else outside

    def scalar(self, node: fx.Node) -> Expr:
        outside = self.bound.get(node)
        return self.outer.scalar(outside) if isinstance(outside, fx.Node) else super().scalar(node)


def _grounded(found: Expr, inner: Subgraph, made: Callable[[fx.Node], fx.Node]) -> Expr:
    def ground(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        slot = node.slot.node if isinstance(node.slot, Dot) else node.slot
        if not (isinstance(slot, fx.Node) and slot.graph is inner.mirror.graph):
            return Load(node.slot, tuple(expr.rebuild(x, ground) for x in node.indices), node.dtype)
        if isinstance(node.slot, Dot):
            raise Refused(f"{slot.name} is a product of tensors")
        try:
            outside = made(slot)
        except (Refused, LookupError, Stale) as why:
            raise Refused(f"{_called(slot)} has no formula, and {why}") from None
        return Load(outside, tuple(expr.rebuild(x, ground) for x in node.indices), node.dtype)

    return expr.rebuild(found, ground)


def _called(node: fx.Node) -> str:
    name = str(getattr(node.target, "overloadpacket", node.name))
    return name.removeprefix("aten.")
