"""Graphs inside a graph: the regions of checkpointing, cond, while_loop and nested compiles, each rewritten in its own right.

A Dynamo graph holds such a region as a GraphModule beside it and calls it through a higher-order operator. What the region is given
are its placeholders, so that it reads like any other graph. One thing would be lost: a mask that the model builds once, outside of
all its checkpointed layers, is data inside of them. So what is computed from indices and small inputs alone is computed again
inside, where it can be proved what it is; what the region does not need then is taken out again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnfx.graphs.levels import closed
from attnfx.graphs.mirror import Mirror
from attnfx.lowering.timeline import NOTE

#: Operators that run their first argument, a graph, once, with the rest of their arguments.
_CALLS = ("tag_activation_checkpoint", "wrap")
_OPENED = (*_CALLS, "cond", "while_loop", "invoke_subgraph")
#: What a mask is made of: operations of values alone, cheap to do twice.
_FORMULA = frozenset((
    "arange", "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "tril", "triu", "getitem", "view", "reshape",
    "expand",
    "expand_as", "unsqueeze", "squeeze", "transpose", "permute", "t", "to", "bool", "int", "long", "float", "type_as", "type",
    "add", "sub", "rsub", "mul", "neg", "abs", "where", "masked_fill", "logical_and", "logical_or", "logical_not", "bitwise_and",
    "bitwise_or", "bitwise_not", "invert", "and_", "or_", "not_", "inv", "eq", "ne", "lt", "le", "gt", "ge", "__and__", "__or__",
    "__invert__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__getitem__", "__rsub__", "__radd__", "__rmul__",
    "floordiv", "mod", "truediv", "__floordiv__", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "broadcast_to", "size",
    "dim", "cumsum", "contiguous",
))  # fmt: skip
_LARGEST = 200


@dataclass(frozen=True)
class Region:
    """A graph that ``node`` runs, held as attribute ``name`` of the graph module."""

    node: fx.Node
    name: str
    module: fx.GraphModule


def regions(gm: fx.GraphModule) -> Iterator[Region]:
    """Every graph inside ``gm`` that may be rewritten, once each."""
    shut, seen = closed(gm.graph), set[str]()
    for node in gm.graph.nodes:
        if node in shut or not _is(node, _OPENED):
            continue
        for attribute in node.all_input_nodes:
            module = getattr(gm, str(attribute.target), None) if attribute.op == "get_attr" else None
            if isinstance(module, fx.GraphModule) and attribute.target not in seen:
                seen.add(str(attribute.target))
                yield Region(node, str(attribute.target), module)


@contextmanager
def autocast_at(node: fx.Node) -> Iterator[None]:
    """The autocast regions that ``node`` is in, entered."""
    entered: list[fx.Node] = []
    for before in node.graph.nodes:
        if before is node:
            break
        if before.target is torch.amp.autocast_mode._enter_autocast:
            entered.append(before)
        elif before.target is torch.amp.autocast_mode._exit_autocast and before.args[0] in entered:
            entered.remove(before.args[0])
    with ExitStack() as stack:
        for region in entered:
            stack.enter_context(torch.amp.autocast_mode.autocast(*region.args, **region.kwargs))  # type: ignore[arg-type]
        yield


def is_call(node: fx.Node) -> bool:
    """Whether ``node`` runs its first argument once, with the rest of its arguments, and returns what that returns."""
    return _is(node, _CALLS)


def sink_masks(gm: fx.GraphModule, mirror: Mirror) -> bool:
    """Compute again inside each region of ``gm`` what it is given of masks; whether anything changed (the mirror is then out of
    date).

    Replaces the regions' modules by copies.
    """
    changed = False
    for region in list(regions(gm)):
        attribute = next(n for n in region.node.all_input_nodes if n.op == "get_attr" and n.target == region.name)
        if not is_call(region.node) or region.node.args[0] is not attribute or len(attribute.users) > 1 or _shared(gm, region.name):
            continue
        for operand in dict.fromkeys(region.node.args[1:]):
            formula = _formula(mirror, operand) if isinstance(operand, fx.Node) else None
            if formula is not None:
                _sink(gm, region, operand, formula)  # type: ignore[arg-type]
                changed = True
    return changed


def drop_unread(gm: fx.GraphModule, names: Collection[str]) -> None:
    """Take out of each region of ``names``, and of its call, the inputs that nothing reads; and of ``gm`` the formulas that nothing
    reads then."""
    for region in list(regions(gm)):
        if region.name not in names or not is_call(region.node) or _shared(gm, region.name):
            continue
        inputs = region.module.graph.find_nodes(op="placeholder")
        unread = [k for k, p in enumerate(inputs) if not p.users]
        if not unread or len(inputs) != len(region.node.args) - 1:
            continue
        given = [region.node.args[k + 1] for k in unread]
        for k in unread:
            region.module.graph.erase_node(inputs[k])
        region.module.recompile()
        region.node.args = tuple(a for k, a in enumerate(region.node.args) if k - 1 not in unread)
        queue = [node for node in given if isinstance(node, fx.Node)]
        erased = set[fx.Node]()
        while queue:
            node = queue.pop()
            if node not in erased and not node.users and node.op.startswith("call") and _named(node) in _FORMULA:
                queue += node.all_input_nodes
                gm.graph.erase_node(node)
                erased.add(node)


def _formula(mirror: Mirror, node: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute ``node`` from inputs and indices alone, in graph order; None where it is anything else."""
    if node.op == "placeholder" or not isinstance(_example(node), torch.Tensor):
        return None
    written = {storage for _, storage in mirror.mutations}
    found, queue = {node}, [node]
    while queue:
        at = queue.pop()
        value, example = mirror.value.get(at), _example(at)
        if isinstance(example, torch.Tensor):
            if example.requires_grad or value is None or mirror.storage.get(value) in written or at in mirror.blind:
                return None
            if at.op == "placeholder" and example.is_floating_point() and example.dim() > 2:
                return None
        if at.op != "placeholder" and (at.op not in ("call_function", "call_method") or _named(at) not in _FORMULA):
            return None
        queue += [older for older in at.all_input_nodes if older not in found]
        found.update(at.all_input_nodes)
    return [n for n in ordered(node.graph, found)] if len(found) <= _LARGEST else None


def ordered(graph: fx.Graph, nodes: set[fx.Node]) -> list[fx.Node]:
    """``nodes`` in the order of ``graph``."""
    return [n for n in graph.nodes if n in nodes]


def _sink(gm: fx.GraphModule, region: Region, operand: fx.Node, formula: list[fx.Node]) -> None:
    module = getattr(gm, region.name)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    inputs = graph.find_nodes(op="placeholder")
    inner = dict(zip(region.node.args[1:], inputs, strict=True))
    last = inputs[-1]
    copies: dict[fx.Node, fx.Node] = {}
    for node in formula:
        if node.op == "placeholder" and node in inner:
            copies[node] = inner[node]
            continue
        with graph.inserting_after(last):
            last = copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            region.node.args = (*region.node.args, node)
    # A copied placeholder came after copied operations: placeholders come first.
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for placeholder in [n for n in graph.nodes if n.op == "placeholder"]:
        if first < placeholder:
            first.prepend(placeholder)
    inner[operand].replace_all_uses_with(copies[operand])
    setattr(gm, region.name, fx.GraphModule(module, graph))


def unnamed(gm: fx.GraphModule, name: str, inner: fx.GraphModule) -> None:
    """Take the names of a timeline from the attentions of ``inner``, the region ``name`` of ``gm``, where several calls run it:
    each would bear the first layer's."""
    if not _shared(gm, name):
        return
    for module in inner.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if str(node.target).startswith(("attnfx.attention", "attnfx.linear_site", "attnfx.vendor_attention")):
                    node.args = (*node.args[:6], "", *node.args[7:])
                    node.meta["custom"] = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != NOTE}
                elif str(node.target).startswith("attnfx.linear_attention"):
                    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "site"}
            module.recompile()


def _shared(gm: fx.GraphModule, name: str) -> bool:
    return len([n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]) > 1


def _is(node: fx.Node, names: tuple[str, ...]) -> bool:
    return bool(isinstance(node.target, torch._ops.HigherOrderOperator)) and str(node.target) in names


def _named(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return "getitem" if node.target is operator.getitem else str(getattr(node.target, "__name__", ""))


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))
