"""The nodes of a graph before and after a rewrite, as data to draw: what each calls and reads, its module, and its role."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnfx.graphs.origin import module_path, source_line


@dataclass(frozen=True)
class DrawnNode:
    """One node: its ``name``, unique in its graph, what it ``calls``, the names of the nodes that it ``reads``, the path of its
    ``module``, its ``source`` line, and its ``role``: "kept" where both graphs have it, "removed" or "new". ``read_before``: what a
    kept node read before, where that is something else now."""

    name: str
    calls: str
    reads: tuple[str, ...]
    module: str
    source: str
    role: str = "kept"
    read_before: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphView:
    """The nodes of both graphs, in an order in which each of them runs."""

    nodes: tuple[DrawnNode, ...]


def view(before: fx.GraphModule, after: fx.GraphModule) -> GraphView:
    """Both graphs as one list."""
    old, new = _drawn(before), _drawn(after)
    nodes: list[DrawnNode] = []
    rest = iter(old.items())
    for name, node in new.items():
        if name not in old:
            nodes.append(replace(node, role="new"))
            continue
        for earlier, gone in rest:
            if earlier == name:
                break
            if earlier not in new:
                nodes.append(replace(gone, role="removed"))
        earlier_reads = old[name].reads
        nodes.append(node if earlier_reads == node.reads else replace(node, read_before=earlier_reads))
    nodes += [replace(gone, role="removed") for name, gone in rest if name not in new]
    return GraphView(tuple(_placed(nodes)))


def _placed(nodes: list[DrawnNode]) -> list[DrawnNode]:
    """New nodes without a module belong where the first node that reads them does."""
    reader: dict[str, DrawnNode] = {}
    found = []
    for node in reversed(nodes):
        if node.role == "new" and not node.module and node.name in reader:
            node = replace(node, module=reader[node.name].module, source=node.source or reader[node.name].source)
        reader |= dict.fromkeys(node.reads, node)
        found.append(node)
    return found[::-1]


def _drawn(gm: fx.GraphModule, prefix: str = "") -> dict[str, DrawnNode]:
    found = {}
    for node in gm.graph.nodes:
        inner = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            found.update(_drawn(inner, f"{prefix}{node.target}."))
        reads = tuple(dict.fromkeys(prefix + n.name for n in node.all_input_nodes))
        name = prefix + node.name
        found[name] = DrawnNode(name, _calls(node), reads, module_path(node), source_line(node))
    return found


def _calls(node: fx.Node) -> str:
    """A node's operation in a word or two."""
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    target: Any = node.target
    if isinstance(target, str):
        return target
    name = str(target) if "OpOverload" in type(target).__name__ else getattr(target, "__name__", str(target))
    return name.removeprefix("aten.").removesuffix(".default")
