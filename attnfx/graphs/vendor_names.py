"""Names of the sites that run as torch's own kernels, through Inductor to the kernels that it calls.

A site's node carries its name as a note, which a compiler's tracing keeps. The note of a forward kernel is given to its backward
kernel while both stand in one graph; after the last of Inductor's passes, each is exchanged for the same kernel with a name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from attnfx.lowering.timeline import NOTE

_FOUND = "attnfx_timeline"


def names(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names that are written in a graph and in the graphs inside of it."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    found = (node.meta.get("custom") for graph in graphs for node in graph.nodes)
    return tuple(note[NOTE] for note in found if isinstance(note, dict) and NOTE in note)


class Noted(CustomGraphPass):
    """On the graph of forward and backward: gives a backward kernel the name of the forward kernel whose results it reads.

    ``names`` keep graphs of other names apart in caches.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, graph: fx.Graph) -> None:
        kernels = _kernels()
        for node in graph.nodes:
            if node.op == "call_function" and node.target in kernels:
                read = [a.args[0] for a in node.args if isinstance(a, fx.Node) and a.target is operator.getitem]
                site = (node.meta.get("custom") or {}).get(NOTE)
                forward = [n.meta[_FOUND] for n in read if isinstance(n, fx.Node) and _FOUND in n.meta]
                if found := (forward[0] if forward else site):
                    node.meta[_FOUND] = found

    def uuid(self) -> Any:
        return "attnfx names noted", self.names, get_hash_for_files((__file__,))


class Named(CustomGraphPass):
    """On a graph that is about to be lowered: exchanges the noted kernels for those with a name."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, graph: fx.Graph) -> None:
        kernels = _kernels()
        for node in graph.nodes:
            if _FOUND in node.meta and node.target in kernels:
                _like(kernels[node.target], node.target)
                node.target = kernels[node.target]
                node.kwargs = {**node.kwargs, "site": node.meta[_FOUND]}

    def uuid(self) -> Any:
        return "attnfx names", self.names, get_hash_for_files((__file__,))


def _kernels() -> dict[Any, Any]:
    from attnfx.lowering.vendor_names import NAMED

    return NAMED


def _like(named: Any, kernel: Any) -> None:
    """Inductor demands of the operands of ``named`` what it demands of those of ``kernel``."""
    from torch._inductor import lowering

    if named in lowering.lowerings:
        return

    def constraint(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        plain = SimpleNamespace(target=kernel, args=node.args, kwargs=node.kwargs)
        constrained: Callable[..., Any] = lowering.sdpa_constraint
        return constrained(plain, *args, **kwargs)

    made: Callable[..., Any] = lowering.make_fallback
    made(named, constraint, warn=False)
