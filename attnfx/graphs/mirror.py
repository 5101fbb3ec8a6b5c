"""The mirror of a Dynamo graph: what a trace of it says, node by node, about values, memory and gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfx.algebra.integer_functions import canonical
from attnfx.algebra.integers import Ranges
from attnfx.algebra.nodes import Expr
from attnfx.graphs.world import World, known


class Table(Protocol):
    """An input whose elements may be known in closed form."""

    def element(self, index: tuple[Expr, ...], less: Callable[[Expr, Expr], Expr]) -> Expr | None: ...


@dataclass
class Mirror:
    """The mirror of one Dynamo graph.

    ``origin`` maps each mirror node to the Dynamo node that made it, ``value`` each Dynamo node to the mirror node that holds its
    result (tensor results only), ``mutations`` lists (mirror position, storage) of in-place writes, ``storage`` the storage of
    each node. ``blind`` tells, for each Dynamo node that could not be traced, why. ``results`` holds the mirror nodes of
    Dynamo nodes
    that return several tensors. ``calls`` holds the arguments of each call of a higher-order operator, ``world`` the fake mode and
    the symbols that all was traced with; ``seeds`` are nodes that autograd follows though no Dynamo node says so;
    ``tables`` are inputs whose values are known.
    """

    graph: fx.Graph
    origin: dict[fx.Node, fx.Node]
    value: dict[fx.Node, fx.Node]
    storage: dict[fx.Node, int]
    mutations: list[tuple[int, int]]
    ranges: Ranges
    to_user: dict[sympy.Symbol, sympy.Symbol]
    blind: dict[fx.Node, str] = field(default_factory=dict)
    results: dict[fx.Node, Any] = field(default_factory=dict)
    reason: str = ""
    calls: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    world: World | None = None
    seeds: frozenset[fx.Node] = frozenset()
    tables: Mapping[fx.Node, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = {node: k for k, node in enumerate(self.graph.nodes)}
        self.dynamo_of = {m: d for d, m in self.value.items()}
        self.lifted: dict[Hashable, dict[Any, Any]] = {}
        self._holders: dict[fx.Node, list[fx.Node]] = {}
        for dynamo, node in self.value.items():
            self._holders.setdefault(node, []).append(dynamo)
        self._differentiable: set[fx.Node] = set()
        self._severed: set[fx.Node] = set()
        self._writers: dict[int, list[tuple[int, fx.Node]]] = {}
        nodes = list(self.graph.nodes)
        for at, storage in self.mutations:
            self._writers.setdefault(storage, []).append((at, nodes[at]))
        self._alive: set[fx.Node] | None = None
        self.makers = frozenset(self.origin.values())
        self._follow_autograd()

    def requires_grad(self, node: fx.Node) -> bool:
        """Whether autograd follows ``node`` in the user's graph (the mirror itself is traced without autograd metadata)."""
        return node in self._differentiable

    def severed(self, node: fx.Node) -> bool:
        """Whether the gradient of ``node`` is not that of its formula: a detach, or something done under ``no_grad``."""
        return node in self._severed

    def _follow_autograd(self) -> None:
        followed = True
        for node in self.graph.nodes:
            if node.target is torch._C._set_grad_enabled:
                followed = bool(node.args[0])
            reached = any(n in self._differentiable for n in node.all_input_nodes) and not _made_anew(node)
            dynamo = self.dynamo_of.get(node)
            # an exported graph's "val" requires no gradient
            example = dynamo.meta.get("example_value") if dynamo is not None else None
            wanted = example.requires_grad if isinstance(example, torch.Tensor) else reached and _differentiable(node)
            wanted = wanted or node in self.seeds
            apart = not followed and node.op != "placeholder"  # Dynamo's views made under no_grad claim a gradient that they lack
            if wanted and not (apart and not any(True for _ in written(node))):
                self._differentiable.add(node)
            if reached and (not wanted or apart) and not _boolean(node):  # a condition has no gradient in any formula
                self._severed.add(node)

    def adopt(self, node: fx.Node, at: fx.Node) -> None:
        """Take in a node made later, at the position of ``at``; autograd follows it where it follows what it reads."""
        self.position[node] = self.position[at]
        if _differentiable(node) and any(n in self._differentiable for n in node.all_input_nodes):
            self._differentiable.add(node)

    def outlook(self, at: fx.Node) -> Hashable:
        """What reading values from ``at`` depends on: whether a gradient is wanted there, and the writes that came before."""
        position = self.position[at]
        return self.requires_grad(at), sum(written < position for written, _ in self.mutations)

    def leaves_graph(self, node: fx.Node) -> bool:
        """Whether the user's graph returns the value of ``node``."""
        holders = self._holders.get(node, ())
        return any(user.op == "output" for holder in holders for user in holder.users)

    def written_after(self, node: fx.Node, since: fx.Node) -> bool:
        """Whether the memory behind ``node`` is written later than ``since``."""
        return bool(self.writers(node, self.position[since] + 1))

    def overwritten(self, node: fx.Node, until: fx.Node) -> bool:
        """Whether the memory behind ``node`` is written between its making and ``until``."""
        return bool(self.writers(node, self.position[node] + 1, self.position[until]))

    def writers(self, node: fx.Node, first: int, end: int | None = None) -> list[fx.Node]:
        """The nodes that write the memory behind ``node`` at positions from ``first`` to below ``end``, in order."""
        storage = self.storage.get(node)
        known = [] if storage is None else self._writers.get(storage, [])
        return [writer for at, writer in known if first <= at and (end is None or at < end)]

    def targets(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that ``node`` writes in place."""
        return list(written(node))

    def holder(self, node: fx.Node) -> fx.Node:
        """The first Dynamo node with the value of ``node``."""
        return next(iter(self._holders.get(node, ())), self.dynamo_of[node])

    def live(self, node: fx.Node) -> bool:
        """Whether the value of ``node`` reaches an output of the graph, or memory that is visible outside of it."""
        if self._alive is None:
            from attnfx.graphs.liveness import live_nodes

            self._alive = live_nodes(self)
        return node in self._alive


def sizes(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The sizes of a mirror node's tensor as sympy integers or expressions."""
    return tuple(as_sympy(s) for s in node.meta["val"].shape)


def as_sympy(value: int | torch.SymInt) -> sympy.Expr:
    """A size or another integer of a graph, in the functions that index expressions hold where it has a form there."""
    if not isinstance(value, torch.SymInt):
        return sympy.Integer(value)
    e = value.node.expr
    return e if e.is_Symbol else canonical(e, known(value.node.shape_env, e.free_symbols))


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


#: In-place by name only: no element changes.
_HARMLESS = (torch.ops.aten.detach_.default, torch.ops.aten.requires_grad_.default)


def _differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    floating = not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
    return floating and node.target is not torch.ops.aten.detach.default


def _boolean(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype == torch.bool


def _made_anew(node: fx.Node) -> bool:
    """Whether only the sizes of the operands matter (zeros_like, new_full), so that no gradient is lost on the way."""
    name = _name(node)
    return name.endswith("_like") or name.startswith("new_")


def _name(node: fx.Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements matter to ``node``: not those that lend it a size or a dtype (zeros_like, x.view_as(node))."""
    if _made_anew(node):
        return []
    return node.all_input_nodes[:1] if _name(node).endswith("_as") else node.all_input_nodes


def descends(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether the elements of ``node`` are computed from those of ``ancestor``."""
    seen, queue = {node}, [node]
    while queue:
        above = queue.pop()
        if above is ancestor:
            return True
        fresh = [n for n in value_inputs(above) if n not in seen]
        seen.update(fresh)
        queue += fresh
    return False


def written(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that an operation writes in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _HARMLESS:
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            yield from (x for x in pytree.tree_leaves(value) if isinstance(x, fx.Node))
