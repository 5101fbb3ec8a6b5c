"""Tensors that a call hands to a model, by the names that it has for them: ids of documents, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnfx.errors import listing, nearest
from attnfx.graphs.mirror import Mirror, as_sympy
from attnfx.site import SideTensor


def placeholder(graph: fx.Graph, name: str) -> fx.Node | str:
    """The input of a Dynamo graph that its caller knows as ``name``, or why there is none."""
    known: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        if (found := _name(getattr(node.meta.get("grapharg"), "source", None))) is not None:
            known.setdefault(found, []).append(node)
    if len(known.get(name, ())) == 1:
        return known[name][0]
    if name in known:
        return f'{len(known[name])} inputs of this graph have the name "{name}".'
    has = listing(sorted(known)) or "none with a name"
    return f'The graph reads no input that the call names "{name}"; it has {has}.{nearest(name, known)}'


def described(graph: fx.Graph, mirror: Mirror, name: str) -> SideTensor | str:
    """The sizes and the dtype of an input, or why it is not known."""
    node = placeholder(graph, name)
    value = mirror.value.get(node) if isinstance(node, fx.Node) else None
    traced = None if value is None else value.meta.get("val")
    if isinstance(traced, torch.Tensor):
        return SideTensor(tuple(map(as_sympy, traced.shape)), traced.dtype)
    return node if isinstance(node, str) else f'The input "{name}" is no tensor.'


def _name(source: Any) -> str | None:
    """``ids`` of ``L['ids']``, ``L['kwargs']['ids']`` and ``L['batch']['ids']``; None of what a module holds, or has no name."""
    if source is None:
        return None
    given = source.name() if callable(source.name) else source.name
    if any(part in given for part in ("._parameters[", "._buffers[", "._modules[")):
        return None
    last = getattr(source, "local_name", None) or getattr(source, "index", None) or getattr(source, "member", None)
    return last if isinstance(last, str) else None
