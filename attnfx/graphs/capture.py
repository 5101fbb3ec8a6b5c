"""Capture: a Dynamo graph traced to its *mirror*, a pre-dispatch ATen graph to read and never to run.

The mirror is traced under a FakeTensorMode and a ShapeEnv of its own, so that looking adds no guard and no specialisation to the
user's compile. Every mirror node knows the Dynamo node that made it; what cannot be traced becomes an opaque node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from attnfx.graphs import batched, levels
from attnfx.graphs.mirror import Mirror, is_tensor, written
from attnfx.graphs.surroundings import formats_unasked, undisturbed
from attnfx.graphs.trace_memo import TraceMemo, Twin, difference, inputs_of, kind
from attnfx.graphs.world import World, example_of


def opaque(*args: Any) -> Any:
    """Target of mirror nodes that stand for something that could not be traced."""
    raise RuntimeError("an opaque mirror node is read, never run")


def called(*args: Any) -> Any:
    """Target of mirror nodes that stand for a whole call of one of :data:`CALLS`; they hold its arguments, subgraphs left out."""
    raise RuntimeError("a call in the mirror is read, never run")


#: Higher-order operators that are one node in the mirror; :mod:`attnfx.graphs.callees` reads the functions that they are given.
CALLS = (torch.ops.higher_order.flex_attention,)


def capture(gm: fx.GraphModule) -> Mirror:
    """Trace ``gm`` (with ``example_value`` metadata, as Dynamo makes it) to its mirror. Never raises for what a model may hold."""
    world = World(gm)
    return traced(Tracer(gm, world), world.inputs)


def traced(tracer: Tracer, inputs: Sequence[Any]) -> Mirror:
    """What ``tracer`` sees when it runs its graph on fake ``inputs``."""
    world = tracer.world
    with torch._guards.tracing(None), undisturbed(), formats_unasked():
        traced = make_fx(tracer.run_fake, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    graph = traced.graph
    nodes = {n.name: n for n in graph.nodes}
    origin = {nodes[name]: d for name, d in tracer.origin.items() if name in nodes}
    value = {d: nodes[name] for d, name in tracer.value.items() if name in nodes}
    for placeholder, d in zip(graph.find_nodes(op="placeholder"), tracer.placeholders, strict=True):
        origin[placeholder] = d
        value[d] = placeholder
    results = {d: pytree.tree_map(lambda name: nodes.get(name), found) for d, found in tracer.results.items()}
    shared = world.shared()
    storage = {n: shared.get(s, s) for n in graph.nodes if is_tensor(n) for s in [tracer.memo.memory_of(n)]}
    mutations = [(k, storage[a]) for k, n in enumerate(graph.nodes) for a in written(n) if a in storage]
    return Mirror(
        graph,
        origin,
        value,
        storage,
        mutations,
        world.ranges(),
        world.to_user,
        tracer.blind,
        results,
        world.unproved(),
        tracer.calls,
        world,
    )


#: Dynamo nodes that only move Python numbers: a symbolic float may flow through them.
_ARITHMETIC = frozenset(getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "neg", "pow"))


#: Methods that give a tensor other axes in place: Dynamo's example of what they are called on has the later ones.
_TURNS = frozenset(("unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"))
_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


class Tracer(fx.Interpreter):
    """Runs the Dynamo graph node by node under the proxy mode, noting who made what."""

    def __init__(self, gm: fx.GraphModule, world: World) -> None:
        super().__init__(gm)
        self.world = world
        self.origin: dict[str, fx.Node] = {}
        self.value: dict[fx.Node, str] = {}
        self.results: dict[fx.Node, Any] = {}
        self.blind: dict[fx.Node, str] = {}
        self.closed = levels.closed(gm.graph)
        self.apart = levels.mapped_products(gm.graph)
        self.calls: dict[fx.Node, tuple[Any, ...]] = {}
        self.lost = False
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.owned = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}  # of an exported graph; Dynamo makes them inputs
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
        # Constants of the graph (get_attr) are converted by the mode as they are met.
        with self.world.mode:
            self.run(*inputs, enable_io_processing=False)
        return ()

    def run_node(self, n: fx.Node) -> Any:
        mode = get_proxy_mode()
        if n.op == "output" or mode is None:
            return ()
        if n.op == "placeholder":
            return self.memo.twins(super().run_node(n), (), mode.tracer)
        known = self.memo.key(n, self.env, kind(example_of(n))) if _holds_tensors(example_of(n)) else None
        key, inputs = known or (None, inputs_of(n, self.env))
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

    def batched(self, n: fx.Node, result: Any) -> bool:
        """Whether a result has axes that its node in the user's graph does not show."""
        return n not in self.apart and batched.hidden(result)

    def traced(self, n: fx.Node, tracer: Any, key: Any, inputs: list[Twin]) -> tuple[Any, list[fx.Node]]:
        """The value of ``n`` by running it under the tracer, and the mirror nodes that it made."""
        before, last = [t.node for t in inputs], next(iter(reversed(tracer.graph.nodes)), None)
        result = self.value_of(n)
        seen = self.batched(n, result) or n.op == "get_attr" or not isinstance(result, torch.Tensor)
        if not seen and _proxy_of(result, tracer) is None:
            self.blind[n] = "a tensor that tracing lost sight of"
            result = self.stand_in(n)
        made: list[fx.Node] = []
        for node in reversed(tracer.graph.nodes):
            if node is last:
                break
            made.insert(0, node)
        if self.batched(n, result):
            return result, made
        result = self.memo.twins(result, inputs, tracer)
        if key is not None and n not in self.blind:
            self.memo.learn(key, result, inputs, before, made)
        return result, made

    def value_of(self, n: fx.Node) -> Any:
        self.lost = self.lost and batched.inside()
        why = self.not_traceable(n)
        if n.op == "get_attr" and n.target in self.owned:
            n.meta["example_value"] = self.owned[str(n.target)]
            return self.stand_in(n)
        if n.target in _AUTOCAST:
            return self.autocast(n)
        if why is None:
            try:
                with nullcontext() if n in self.apart else batched.seen_through(get_proxy_mode()):
                    result = self.call_of(n) if n.target in CALLS else super().run_node(n)
                why = self.difference(result, n)
                if why is None:
                    return result
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.blind[n] = why
        self.lost = self.lost or batched.inside()
        return self.stand_in(n)

    def difference(self, result: Any, n: fx.Node) -> str | None:
        turned = any(u.op == "call_method" and u.target in _TURNS and u.args[0] is n for u in n.users)
        return difference(result, example_of(n), ranked=not turned)

    def call_of(self, n: fx.Node) -> Any:
        """A call of a higher-order operator as one node with its tensors and numbers."""
        mode = get_proxy_mode()
        assert mode is not None
        given, _ = self.fetch_args_kwargs_from_env(n)
        if any(isinstance(x, torch.Tensor) and _proxy_of(x, mode.tracer) is None for x in pytree.tree_leaves(given)):
            raise LookupError("it is given a tensor that tracing lost sight of")
        unwrap: Callable[[Any], Any] = mode.tracer.unwrap_proxy  # type: ignore[union-attr]
        shown = pytree.tree_map(lambda x: None if isinstance(x, fx.GraphModule) else unwrap(x), given)
        result = self.stand_in(n, called, shown)
        self.calls[n] = given
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(batched.direct(target), args, kwargs)

    def autocast(self, n: fx.Node) -> Any:
        """Enter or leave an autocast region for real: tracing alone would only write it down."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with torch._C.DisableTorchFunction():
            return n.target(*args, **kwargs)  # type: ignore[operator]

    def not_traceable(self, n: fx.Node) -> str | None:
        if n in self.closed:
            return self.closed[n]
        if n in self.apart and getattr(n.target, "__name__", "") == "_remove_batch_dim":
            return "the result of a vmap that attention is computed in"
        if self.lost and getattr(n.target, "__name__", "") not in batched.LEVELS:
            return "under a vmap, something else could not be traced"  # a stand-in does not carry the hidden axes
        if isinstance(example_of(n), torch.SymFloat) and n.target not in _ARITHMETIC:
            return "a number known only at run time"
        if isinstance(n.target, torch._ops.HigherOrderOperator) and n.target not in CALLS:
            return f"the higher-order operator {n.target}"
        return None

    def stand_in(self, n: fx.Node, target: Callable[..., Any] = opaque, args: tuple[Any, ...] = ()) -> Any:
        """Fake results of the right shape, tracked as the outputs of one opaque node."""
        mode = get_proxy_mode()
        assert mode is not None
        with disable_proxy_modes_tracing():
            result = pytree.tree_map(self.world.convert, example_of(n))
        if not any(isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat) for leaf in pytree.tree_leaves(result)):
            return result
        proxy = mode.tracer.create_proxy("call_function", target, args, {}, name=f"{target.__name__}_{n.name}")
        track_tensor_tree(result, proxy, constant=None, tracer=mode.tracer)
        return result


def _holds_tensors(example: Any) -> bool:
    """Whether an operation makes tensors: one that does not is run for what it switches."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(example))


def _proxy_of(tensor: torch.Tensor, tracer: Any) -> fx.Node | None:
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node
