"""Looks inside a compiled model: the graphs handed on, tensors of S x S elements in them, peak memory of a call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves


def square_tensors(gm: fx.GraphModule, length: int) -> list[str]:
    """Names of the nodes of `gm` that hold a tensor with two axes of at least `length`: the S x S ones.

    Reads the values that Dynamo (`example_value`) or AOTAutograd (`val`) left on the nodes, and propagates shapes
    anew where a node has none. Sizes that are symbols count with their hints. Choose `length` greater than every
    width of the model, or the weights are found as well.
    """
    values = _values(gm)
    return [
        node.name
        for node in gm.graph.nodes
        if node.op != "output" and any(_is_square(leaf, length) for leaf in tree_leaves(values.get(node)))
    ]


@dataclass
class GraphLog:
    """A backend that runs a graph as it is and keeps it: `options={"inner": log}`, then look at `log.graphs`."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        forward: Callable[..., Any] = gm.forward
        return forward


@dataclass
class AtenLog(GraphLog):
    """The same one level lower: the forward and backward graphs in ATen operators that AOTAutograd makes."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch._aot_autograd.utils import make_boxed_func

        def keep(aten: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            self.graphs.append(aten)
            boxed: Callable[..., Any] = make_boxed_func(aten.forward)
            return boxed

        compiled: Callable[..., Any] = aot_autograd(fw_compiler=keep)(gm, list(example_inputs))
        return compiled


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes of tensors alive at the highest moment of `call()`, above what was alive before it.

    On a CPU counted by the profiler from every allocation, those inside compiled kernels and operators included;
    on a CUDA device by the caching allocator. On a CPU the number varies between calls, by what Python's collector of
    cycles happens to hold: take the least of a few.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    alive = peak = 0
    for change in _allocations(profile):
        alive += change
        peak = max(peak, alive)
    return peak


def _allocations(profile: torch.profiler.profile) -> Iterator[int]:
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        raise RuntimeError("the profiler recorded nothing, so memory cannot be measured")
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        yield event.nbytes()


def _is_square(value: object, length: int) -> bool:
    if not isinstance(value, Tensor):
        return False
    sizes = [_hint(size) for size in value.shape]
    return sum(size >= length for size in sizes) >= 2


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 0


def _values(gm: fx.GraphModule) -> dict[fx.Node, object]:
    known = {node: _recorded(node) for node in gm.graph.nodes}
    unknown = [node for node in gm.graph.nodes if node.op.startswith("call") and known[node] is None]
    if not unknown:
        return known
    if any(node.op == "placeholder" and known[node] is None for node in gm.graph.nodes):
        raise ValueError(f"no value is recorded for {unknown[0].name} and none for a placeholder to derive it from")
    mode = detect_fake_mode([known[node] for node in gm.graph.nodes if node.op == "placeholder"])
    return _Propagation(gm, mode or FakeTensorMode(allow_non_fake_inputs=True)).values


def _recorded(node: fx.Node) -> object:
    value = node.meta.get("example_value")
    return value if value is not None else node.meta.get("val")


class _Propagation(fx.Interpreter):
    """Runs a graph on fake tensors, starting from the placeholders' recorded values."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode, self.values = mode, dict[fx.Node, object]()
        inputs = [self._fake(_recorded(node)) for node in gm.graph.nodes if node.op == "placeholder"]
        with mode:
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = result = super().run_node(n)
        return result

    def fetch_attr(self, target: str) -> Any:
        return self._fake(super().fetch_attr(target))

    def _fake(self, value: object) -> object:
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value
