"""Buffers: values known when a graph is compiled, read to prove structure, under a guard that notices a change.

nanoGPT keeps its causal mask as a table of ones and zeros, GPT-Neo its window; to a graph such a table is an input like any other.
A registered buffer of a module is read, and where it has a structure (:mod:`attnfx.graphs.structure`), its elements are that
formula. Arguments and plain attributes are never read. The values themselves, and those of parameters, are read where a policy asks
for a variant that is computed from them, and no gradient is asked of them (:mod:`attnfx.graphs.constants`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._guards import Source

from attnfx.expr import Expr
from attnfx.graphs import buffer_guard
from attnfx.graphs.buffer_guard import Proof
from attnfx.graphs.mirror import Mirror
from attnfx.graphs.structure import Less, Structure, Values, fit
from attnfx.graphs.subgraphs import Region, is_call

#: Where a module keeps them.
_REGISTERED = ("_buffers", "_parameters")


class Restless(str):
    """Why values are not read that were, until they changed too often."""


class Buffer:
    """One buffer or parameter of the graph that is being compiled, read when its first element, or its values, are asked for."""

    def __init__(self, source: Source, tensor: torch.Tensor) -> None:
        self.source, self.tensor = source, tensor
        self.proof: Proof | None = None
        self.held: Proof | None = None

    @property
    def name(self) -> str:
        """Its path, as ``model.named_buffers()`` spells it."""
        parts: list[str] = []
        source: Any = self.source
        while source is not None:
            if getattr(getattr(source, "base", None), "member", "") in ("_modules", *_REGISTERED):
                parts.insert(0, str(source.index))
            source = getattr(source, "base", None)
        return ".".join(part for part in parts if part != "_orig_mod")

    @cached_property
    def structure(self) -> Structure | None:
        if not buffer_guard.plain(self.tensor):
            return None
        past = buffer_guard.history(self.source)
        if past.restless:
            return None
        proof = Proof(self.tensor, past)  # what is seen is older than what is read: a write in between is noticed
        found = proof.structure = fit(self.tensor)
        if found is not None:
            if found not in past.structures:
                past.structures.append(found)
            self.proof = None if past.restless else proof
        return None if self.proof is None else found

    @property
    def restless(self) -> bool:
        """Whether its values change too often to be read."""
        return buffer_guard.history(self.source, "values").restless

    @cached_property
    def values(self) -> torch.Tensor | None:
        """A copy of its values, which the compiled graph may hold; None where it is too large, or changes too often."""
        if self.restless:
            return None
        past = buffer_guard.history(self.source, "values")
        proof = Proof(self.tensor, past, Values.of, buffer_guard.constant)
        found = proof.structure = Values.of(self.tensor)
        if found is not None:
            if found not in past.structures:
                past.structures.append(found)
            self.held = None if past.restless else proof
        return None if found is None or self.held is None else found.tensor

    def element(self, index: tuple[Expr, ...], less: Less) -> Expr | None:
        """The element at ``index``; None where only the tensor itself knows."""
        return None if self.structure is None else self.structure.element(index, less)


Given = Sequence[Buffer | None]


def given(gm: fx.GraphModule) -> Given:
    """The buffer or parameter behind each input of a graph that Dynamo is compiling, where it is one that may be read."""
    known = buffer_guard.guardable()
    if known:
        buffer_guard.begin()
    return [_buffer(p, known) for p in gm.graph.find_nodes(op="placeholder")]


def _buffer(placeholder: fx.Node, guarded: Collection[Source]) -> Buffer | None:
    argument = placeholder.meta.get("grapharg")
    source, tensor = getattr(argument, "source", None), getattr(argument, "example", None)
    if source is None or source not in guarded or not _registered(source) or not buffer_guard.constant(tensor):
        return None
    return Buffer(source, tensor)  # type: ignore[arg-type]


def _registered(source: Any) -> bool:
    """Whether a source is ``module._buffers[name]`` or ``module._parameters[name]``."""
    base = getattr(source, "base", None)
    of_module = type(base).__name__ in ("UnspecializedParamBufferSource", "ParamBufferSource")
    return of_module and getattr(base, "member", "") in _REGISTERED and isinstance(getattr(source, "index", None), str)


def inside(region: Region, mirror: Mirror, buffers: dict[fx.Node, Buffer]) -> Given:
    """The buffer behind each input of a graph that the graph of ``mirror`` calls; ``buffers`` by the mirror's nodes."""
    inputs = region.module.graph.find_nodes(op="placeholder")
    passed = region.node.args[1:]
    if not is_call(region.node) or len(passed) != len(inputs):
        return [None] * len(inputs)
    values = [mirror.value.get(x) if isinstance(x, fx.Node) else None for x in passed]
    return [None if value is None else buffers.get(value) for value in values]


def readable(gm: fx.GraphModule, mirror: Mirror, given: Given) -> dict[fx.Node, Buffer]:
    """The buffers of ``gm`` by the nodes of its mirror, without those that the graph writes or may write to."""
    if not any(given):
        return {}
    written = {storage for _, storage in mirror.mutations}
    for node in mirror.blind:
        if not (is_call(node) and isinstance(node.args[0], fx.Node) and _quiet(getattr(gm, str(node.args[0].target), None))):
            written |= {mirror.storage[v] for n in node.all_input_nodes if (v := mirror.value.get(n)) in mirror.storage}
    placeholders = gm.graph.find_nodes(op="placeholder")
    pairs = [(mirror.value[p], b) for p, b in zip(placeholders, given, strict=True) if b is not None and p in mirror.value]
    return {node: buffer for node, buffer in pairs if mirror.storage.get(node) not in written}


_WRITES = frozenset(("setitem", *(
    f"i{op}" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
)))  # fmt: skip


def _quiet(module: object) -> bool:
    """Whether nothing in a graph, by its name, writes in place or is a graph of its own."""
    if not isinstance(module, fx.GraphModule):
        return False
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        loud = (name.endswith("_") and not name.startswith("_")) or name.strip("_") in _WRITES or "out" in node.kwargs
        if loud or node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return False
    return True


def behind(output: fx.Node, until: Collection[fx.Node], buffers: dict[fx.Node, Buffer]) -> tuple[str, ...]:
    """The names of the buffers whose structure was read between the nodes ``until`` and ``output``."""
    seen, queue, found = {output, *until}, [output], dict[str, None]()
    while queue:
        node = queue.pop()
        if node in buffers and buffers[node].proof is not None:
            found[buffers[node].name] = None
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        queue += new
    return tuple(sorted(found))


def guard(given: Given) -> None:
    """Guard every buffer that was read. Raises whatever Dynamo raises where it cannot."""
    if proofs := [(b.source, proof) for b in given if b is not None for proof in (b.proof, b.held) if proof is not None]:
        buffer_guard.install(proofs)
