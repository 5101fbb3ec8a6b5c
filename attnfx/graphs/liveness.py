"""Liveness: which values of a mirror reach an output of the graph, or memory that is visible outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfx.graphs.mirror import Mirror, is_tensor

#: Operations that read the sizes of a tensor and nothing of its elements.
_SIZES = ("aten.sym_size", "aten.sym_numel", "aten.sym_stride", "aten.sym_storage_offset")


def live_nodes(mirror: Mirror) -> set[fx.Node]:
    """The nodes whose value matters to a caller.

    A result of the graph matters; so does a write to memory that existed before (inputs, parameters, buffers), and whatever is
    given to an operation that could not be traced, or that does more than compute tensors. Reading memory makes every earlier
    write to it matter.
    """
    alive: set[fx.Node] = set()
    end = len(mirror.position)
    reached: dict[int, int] = {}  # each storage, and the position up to which the writes to it matter
    queue: list[fx.Node] = []

    def want(node: fx.Node, seen_at: int) -> None:
        if node not in alive:
            alive.add(node)
            queue.append(node)
        storage = mirror.storage.get(node)
        if storage is not None and reached.get(storage, -1) < seen_at:
            reached[storage] = seen_at
            for writer in mirror.writers(node, 0, seen_at):
                want(writer, mirror.position[writer])

    for node in _roots(mirror):
        want(node, end)
    while queue:
        node = queue.pop()
        for source in node.all_input_nodes:
            want(source, mirror.position[node])
    return alive


def _roots(mirror: Mirror) -> Iterator[fx.Node]:
    outside = {mirror.storage[n] for n in mirror.graph.nodes if n in mirror.storage and (n.op != "call_function" or _opaque(n))}
    for node in mirror.graph.nodes:
        if _effect(node):
            yield node
        if node in mirror.storage and mirror.storage[node] in outside:
            yield from mirror.writers(node, 0)
    readers = set(mirror.blind)
    for dynamo in (*mirror.value, *mirror.results, *mirror.blind):
        readers.update(user for user in dynamo.users if user.op == "output" or _unseen(mirror, user))
    for reader in readers:
        for source in reader.all_input_nodes:
            yield from _held(mirror, source)


def _held(mirror: Mirror, dynamo: fx.Node) -> Iterator[fx.Node]:
    """The mirror nodes with the value of a Dynamo node, or with those of its several results."""
    found: list[Any] = [mirror.value.get(dynamo), *pytree.tree_leaves(mirror.results.get(dynamo))]
    yield from (node for node in found if isinstance(node, fx.Node))


def _unseen(mirror: Mirror, user: fx.Node) -> bool:
    """Whether a Dynamo node left nothing in the mirror that would show what it reads."""
    if user in mirror.value or user in mirror.results:
        return False
    return user not in mirror.makers


def _opaque(node: fx.Node) -> bool:
    return node.name.startswith("opaque_")


def _effect(node: fx.Node) -> bool:
    """Whether a node does something beside computing tensors: an assertion, a number read from a tensor, a mode switched."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return not (is_tensor(node) or isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool))
    if str(node.target.overloadpacket) in _SIZES:
        return False
    made = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if leaf is not None]
    return not made or not all(isinstance(leaf, torch.Tensor) for leaf in made)
