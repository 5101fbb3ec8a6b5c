"""Capture: a Dynamo graph traced to its *mirror*, a pre-dispatch ATen graph to read and never to run.

The mirror is traced under a FakeTensorMode and a ShapeEnv of its own, so that looking adds no guard and no specialisation to the
user's compile. Every mirror node knows the Dynamo node that made it; what cannot be traced becomes an opaque node.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from attnfx.integers import Ranges
from attnfx.trace_memo import TraceMemo, Twin, difference, inputs_of, kind


def opaque(*args: Any) -> Any:
    """Target of mirror nodes that stand for something that could not be traced."""
    raise RuntimeError("an opaque mirror node is read, never run")


@dataclass
class Mirror:
    """The mirror of one Dynamo graph.

    ``origin`` maps each mirror node to the Dynamo node that made it, ``value`` each Dynamo node to the mirror node that holds its
    result (tensor results only), ``mutations`` lists (mirror position, storage) of in-place writes, ``storage`` the storage of
    each node. ``blind`` tells, for each Dynamo node that could not be traced, why. ``results`` holds the mirror nodes of
    Dynamo nodes
    that return several tensors.
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

    def __post_init__(self) -> None:
        self.position = {node: k for k, node in enumerate(self.graph.nodes)}
        self.dynamo_of = {m: d for d, m in self.value.items()}
        self.lifted: dict[Hashable, dict[Any, Any]] = {}
        self._holders: dict[fx.Node, list[fx.Node]] = {}
        for dynamo, node in self.value.items():
            self._holders.setdefault(node, []).append(dynamo)
        self._differentiable: set[fx.Node] = set()
        self._severed: set[fx.Node] = set()
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
            reached = any(n in self._differentiable for n in node.all_input_nodes)
            dynamo = self.dynamo_of.get(node)
            example = _example(dynamo) if dynamo is not None else None
            wanted = example.requires_grad if isinstance(example, torch.Tensor) else reached and _differentiable(node)
            apart = not followed and node.op != "placeholder"  # Dynamo's views made under no_grad claim a gradient that they lack
            if wanted and not (apart and not any(True for _ in _written(node))):
                self._differentiable.add(node)
            if reached and (not wanted or apart):
                self._severed.add(node)

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
        at, storage = self.position[since], self.storage.get(node)
        return any(at < later and s == storage for later, s in self.mutations)

    def overwritten(self, node: fx.Node, until: fx.Node) -> bool:
        """Whether the memory behind ``node`` is written between its making and ``until``."""
        first, last, storage = self.position[node], self.position[until], self.storage.get(node)
        return any(first < at < last and s == storage for at, s in self.mutations)


def sizes(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The sizes of a mirror node's tensor as sympy integers or expressions."""
    return tuple(as_sympy(s) for s in node.meta["val"].shape)


def as_sympy(value: int | torch.SymInt) -> sympy.Expr:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def capture(gm: fx.GraphModule) -> Mirror:
    """Trace ``gm`` (with ``example_value`` metadata, as Dynamo makes it) to its mirror. Never raises for what a model may hold."""
    world = _World(gm)
    tracer = _Tracer(gm, world)
    with torch._guards.tracing(None), _undisturbed():
        traced = make_fx(tracer.run_fake, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*world.inputs)
    graph = traced.graph
    nodes = {n.name: n for n in graph.nodes}
    origin = {nodes[name]: d for name, d in tracer.origin.items() if name in nodes}
    value = {d: nodes[name] for d, name in tracer.value.items() if name in nodes}
    for placeholder, d in zip(graph.find_nodes(op="placeholder"), world.placeholders, strict=True):
        origin[placeholder] = d
        value[d] = placeholder
    results = {d: pytree.tree_map(lambda name: nodes.get(name), found) for d, found in tracer.results.items()}
    shared = world.shared()
    storage = {n: shared.get(s, s) for n in graph.nodes if is_tensor(n) for s in [tracer.memo.memory_of(n)]}
    mutations = [(k, storage[a]) for k, n in enumerate(graph.nodes) for a in _written(n) if a in storage]
    return Mirror(graph, origin, value, storage, mutations, world.ranges(), world.to_user, tracer.blind, results, world.unproved())


#: In-place by name only: no element changes.
_HARMLESS = (torch.ops.aten.detach_.default, torch.ops.aten.requires_grad_.default)


def _differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    floating = not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
    return floating and node.target is not torch.ops.aten.detach.default


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _written(node: fx.Node) -> Iterator[fx.Node]:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _HARMLESS:
        return
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            yield value


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore the global modes that graph nodes switch (grad mode, autocast) however tracing ends."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for device in ("cpu", "cuda"):
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            stack.callback(torch.set_autocast_dtype, device, dtype)
            stack.callback(torch.set_autocast_enabled, device, enabled)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


class _World:
    """Fake inputs in a mode of our own, whose symbols mirror those of the user's ShapeEnv one to one."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.user_env: ShapeEnv | None = None
        self.ours: dict[sympy.Symbol, sympy.Symbol] = {}
        self.to_user: dict[sympy.Symbol, sympy.Symbol] = {}
        self.inputs = [self.convert(_example(p)) for p in self.placeholders]

    def convert(self, value: Any) -> Any:
        """A value of the user's fake world as its twin in ours."""
        if isinstance(value, torch.SymInt):
            return self.symint(value)
        if isinstance(value, torch.SymFloat):
            return self.symfloat(value)
        if not isinstance(value, torch.Tensor):
            return value
        shape = [self.convert(s) for s in value.shape]
        stride = [self.convert(s) for s in value.stride()]
        with self.mode, torch.no_grad():
            twin = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return twin.requires_grad_(value.requires_grad) if value.requires_grad else twin

    def symint(self, value: torch.SymInt) -> int | torch.SymInt:
        self.user_env = value.node.shape_env
        expression = value.node.expr
        ours = expression.xreplace({s: self.symbol(s) for s in expression.free_symbols})
        return self.env.create_symintnode(ours, hint=value.node.hint) if ours.free_symbols else int(ours)

    def symfloat(self, value: torch.SymFloat) -> float | torch.SymFloat:
        self.user_env = value.node.shape_env
        expression = value.node.expr
        if not expression.is_Symbol:
            return value.node.hint if value.node.hint is not None else float("nan")
        return self.env.create_symfloatnode(self.symbol(expression), hint=value.node.hint)

    def symbol(self, s: sympy.Symbol) -> sympy.Symbol:
        if s not in self.ours:
            hint = _hints(self.user_env).get(s)
            if hint is None:
                raise ValueError(f"size {s} has no hint")
            source = ConstantSource(f"__attnfx_{s}")
            plain = float(hint) if hint.is_Float else int(hint)
            twin = self.env.create_symbol(
                plain, source, DimDynamic.DYNAMIC, positive=s.is_positive, do_not_specialize_zero_one=True
            )
            if self.user_env is not None and s in self.user_env.var_to_range and not isinstance(plain, float):
                self.env.var_to_range[twin] = self.user_env.var_to_range[s]
            self.ours[s], self.to_user[twin] = twin, s
        return self.ours[s]

    def shared(self) -> dict[int, int]:
        """For inputs that are views of one memory: the storage of each twin, and the one that stands for all of them."""
        first: dict[int, int] = {}
        pairs = zip(self.placeholders, self.inputs, strict=True)
        tensors = [(_example(p), twin) for p, twin in pairs if isinstance(twin, torch.Tensor)]
        return {_storage(twin): first.setdefault(_storage(example), _storage(twin)) for example, twin in tensors}

    def ranges(self) -> Ranges:
        """What the user's ShapeEnv promises of each size."""
        low, high = {}, {}
        for s in self.to_user:
            bound = self.env.var_to_range.get(s)
            if bound is not None and bound.lower.is_Integer:
                low[s] = bound.lower
            if bound is not None and bound.upper.is_Integer and bound.upper < 2**31:
                high[s] = bound.upper
        return Ranges(low, high)

    def unproved(self) -> str:
        """Why the mirror holds for the traced sizes only; empty where it holds for all that the user's guards admit."""
        known = set() if self.user_env is None else {g.expr for g in self.user_env.guards}
        for guard in self.env.guards:
            expression = guard.expr.xreplace(self.to_user)
            if expression in known or expression == sympy.true:
                continue
            if self.user_env is not None and self.user_env._maybe_evaluate_static(expression) == sympy.true:
                continue
            return f"reading the graph needs {expression}, which the compile does not guarantee"
        return ""


def _hints(env: ShapeEnv | None) -> Mapping[sympy.Symbol, sympy.Expr]:
    if env is None:
        return {}
    hints = env.__dict__.get("backed_var_to_val")  # torch >= 2.12
    return hints if hints is not None else env.__dict__["var_to_val"]  # type: ignore[no-any-return]


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


#: Dynamo nodes that only move Python numbers: a symbolic float may flow through them.
_ARITHMETIC = frozenset(getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "neg", "pow"))


_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


class _Tracer(fx.Interpreter):
    """Runs the Dynamo graph node by node under the proxy mode, noting who made what."""

    def __init__(self, gm: fx.GraphModule, world: _World) -> None:
        super().__init__(gm)
        self.world = world
        self.origin: dict[str, fx.Node] = {}
        self.value: dict[fx.Node, str] = {}
        self.results: dict[fx.Node, Any] = {}
        self.blind: dict[fx.Node, str] = {}
        self.memo = TraceMemo()

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Arguments for an operation that is traced: every value as a tensor that the tracer follows."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer

        def loaded(node: fx.Node) -> Any:
            return pytree.tree_map_only(Twin, lambda t: self.memo.tensor(t, tracer), self.env[node])

        return fx.node.map_arg(args, loaded)

    def run_fake(self, *inputs: Any) -> Any:
        # Tensors that the graph owns (get_attr) are converted by the mode as they are met.
        with self.world.mode:
            self.run(*inputs)
        return ()

    def run_node(self, n: fx.Node) -> Any:
        mode = get_proxy_mode()
        if n.op == "output" or mode is None:
            return ()
        if n.op == "placeholder":
            return self.memo.twins(super().run_node(n), (), mode.tracer)
        key, inputs = self.memo.key(n, self.env, kind(_example(n))) or (None, inputs_of(n, self.env))
        template = self.memo.templates.get(key)
        if template is not None:
            result, made = self.memo.replay(template, inputs, mode.tracer.graph)
        else:
            result, made = self.traced(n, mode.tracer, key, inputs)
        for node in made:
            self.origin[node.name] = n
        if isinstance(result, Twin):
            self.value[n] = result.node.name
        elif isinstance(result, tuple | list):
            self.results[n] = pytree.tree_map(lambda t: t.node.name if isinstance(t, Twin) else None, tuple(result))
        return result

    def traced(self, n: fx.Node, tracer: Any, key: Any, inputs: list[Twin]) -> tuple[Any, list[fx.Node]]:
        """The value of ``n`` by running it under the tracer, and the mirror nodes that it made."""
        before, last = [t.node for t in inputs], next(iter(reversed(tracer.graph.nodes)), None)
        result = self.value_of(n)
        if isinstance(result, torch.Tensor) and n.op != "get_attr" and _proxy_of(result, tracer) is None:
            self.blind[n] = "a tensor that tracing lost sight of"
            result = self.stand_in(n)
        made: list[fx.Node] = []
        for node in reversed(tracer.graph.nodes):
            if node is last:
                break
            made.insert(0, node)
        result = self.memo.twins(result, inputs, tracer)
        if key is not None and n not in self.blind:
            self.memo.learn(key, result, inputs, before, made)
        return result, made

    def value_of(self, n: fx.Node) -> Any:
        why = self.not_traceable(n)
        if n.target in _AUTOCAST:
            return self.autocast(n)
        if why is None:
            try:
                result = super().run_node(n)
                why = difference(result, _example(n))
                if why is None:
                    return result
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.blind[n] = why
        return self.stand_in(n)

    def autocast(self, n: fx.Node) -> Any:
        """Enter or leave an autocast region for real: tracing alone would only write it down."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with torch._C.DisableTorchFunction():
            return n.target(*args, **kwargs)  # type: ignore[operator]

    def not_traceable(self, n: fx.Node) -> str | None:
        if isinstance(_example(n), torch.SymFloat) and n.target not in _ARITHMETIC:
            return "a number known only at run time"
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            return f"the higher-order operator {n.target}"
        return None

    def stand_in(self, n: fx.Node) -> Any:
        """Fake results of the right shape, tracked as the outputs of one opaque node."""
        mode = get_proxy_mode()
        assert mode is not None
        result = pytree.tree_map(self.world.convert, _example(n))
        if not any(isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat) for leaf in pytree.tree_leaves(result)):
            return result
        proxy = mode.tracer.create_proxy("call_function", opaque, (), {}, name=f"opaque_{n.name}")
        track_tensor_tree(result, proxy, constant=None, tracer=mode.tracer)
        return result


def _proxy_of(tensor: torch.Tensor, tracer: Any) -> fx.Node | None:
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node
