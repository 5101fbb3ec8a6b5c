"""Values of side tensors that are known when a graph is compiled: computed from buffers, and from parameters without gradient.

A bias table is a parameter, its index a buffer, and Swin V2's table the result of a small network of both. What depends on nothing
else is computed here, once, from the values that the module has now. They are under the guard of
:mod:`attnfx.graphs.buffer_guard`: other values compile anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnfx.graphs.buffers import Buffer, Restless
from attnfx.graphs.mirror import Mirror
from attnfx.graphs.subgraphs import autocast_at
from attnfx.graphs.surroundings import undisturbed
from attnfx.patterns.versions import Past

#: What is computed from more nodes than this is left to the graph.
MOST_NODES = 200


class Constants:
    """The values of nodes of one graph. ``tables``: the inputs that may be read, by the nodes of ``mirror``; None where none
    may be. ``held``: whether tensors that the graph holds may be, which nothing guards."""

    def __init__(self, gm: fx.GraphModule, mirror: Mirror, tables: Mapping[fx.Node, Buffer] | None, *, held: bool = True) -> None:
        self.gm, self.mirror, self.tables, self.held = gm, mirror, tables, held
        self.known: dict[fx.Node, Any] = {}

    def of(self, past: Past) -> Tensor | str:
        """The values of a side tensor, or why they are not known, as a part of a sentence."""
        node = self.mirror.dynamo_of.get(past.node)
        if self.tables is None:
            return "its values may not be read here"
        if node is None or past.after is not past.node:
            return f"{past.name} is a part of another operation, or was written in place"
        inputs = _ancestors(node)
        if len(inputs) > MOST_NODES:
            return f"{past.name} is computed by {len(inputs)} operations; those of at most {MOST_NODES} are run in advance"
        for each in inputs:
            if why := self._unknown(each) or self._written(each, inputs):
                return why
        with torch._guards.tracing(None), undisturbed(), torch.no_grad():
            for each in inputs:
                if each not in self.known:
                    self.known[each] = self._run(each)
        value = self.known[node]
        return value if isinstance(value, Tensor) else f"{past.name} is no tensor"

    def read(self, past: Past) -> tuple[str, ...]:
        """The names of the buffers and parameters that the values of a side tensor come from."""
        node = self.mirror.dynamo_of.get(past.node)
        tables = self.tables or {}
        found = (tables.get(self.mirror.value[n]) for n in (_ancestors(node) if node else ()) if n in self.mirror.value)
        return tuple(sorted({b.name for b in found if b is not None}))

    def _unknown(self, node: fx.Node) -> str:
        """Why the value of a node is not known in advance; empty where it is, given those that it is computed from."""
        value = self.mirror.value.get(node)
        if node.op == "placeholder":
            buffer = (self.tables or {}).get(value) if value is not None else None
            if buffer is None:
                return f"{node.name} is an input of the call, or a parameter that is trained or written"
            if buffer.values is None:
                often = Restless(f"{buffer.name} has changed too often to be read again")
                return often if buffer.restless else f"{buffer.name} is too large to be read, or empty"
            return ""
        if node.op == "get_attr" and not self.held:
            return f"{node.name} is held by the graph"
        if node.op == "get_attr":
            return "" if isinstance(getattr(self.gm, str(node.target), None), Tensor) else f"{node.name} is no tensor"
        if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.name} runs a graph or a module of its own"
        if node in self.mirror.blind:
            return f"{node.name} could not be traced"
        made = (n for n, origin in self.mirror.origin.items() if origin is node)
        if any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in made):
            return f"{node.name} draws random numbers"
        return ""

    def _written(self, node: fx.Node, run: Collection[fx.Node]) -> str:
        """Why the memory of a node is not what those that are ``run`` make of it; empty where it is."""
        value = self.mirror.value.get(node)
        writers = [] if value is None else self.mirror.writers(value, 0)
        return "" if all(self.mirror.origin.get(w) in run for w in writers) else f"{node.name} is written in place"

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            buffer = (self.tables or {})[self.mirror.value[node]]
            return buffer.values
        if node.op == "get_attr" and not self.held:
            return f"{node.name} is held by the graph"
        if node.op == "get_attr":
            return getattr(self.gm, str(node.target)).detach()
        args: Any = fx.node.map_arg(node.args, self.known.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.known.__getitem__)
        with autocast_at(node):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and all that it is computed from, in the order of the graph."""
    found, queue = {node}, [node]
    while queue:
        fresh = [n for n in queue.pop().all_input_nodes if n not in found]
        found.update(fresh)
        queue += fresh
    return [n for n in node.graph.nodes if n in found]
