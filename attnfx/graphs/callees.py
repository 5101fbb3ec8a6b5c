"""Functions that a higher-order operator is given, traced like the graph around them, and nodes that the graph lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from attnfx.graphs.capture import Tracer, traced
from attnfx.graphs.mirror import Mirror


@dataclass(frozen=True)
class Subgraph:
    """The mirror of a function of tensors: its parameters and its one result as nodes of that mirror."""

    mirror: Mirror
    inputs: tuple[fx.Node, ...]
    result: fx.Node


def subgraph(mirror: Mirror, function: fx.GraphModule, inputs: Sequence[Any], followed: Sequence[bool]) -> Subgraph:
    """``function`` traced on fake ``inputs`` of the world of ``mirror``, in which equal sizes are equal symbols.

    ``followed`` tells which inputs autograd follows. The dtypes are those of ``inputs``, whatever it was recorded with. Raises
    LookupError where it cannot be traced, writes in place, or needs a fact about sizes that the user's guards do not give.
    """
    assert mirror.world is not None
    tracer = _Tracer(function, mirror.world)
    try:
        made = traced(tracer, inputs)
    except Exception as error:
        raise LookupError(f"it could not be traced: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    (result,) = pytree.tree_leaves(function.graph.find_nodes(op="output")[0].args)
    if made.reason:
        raise LookupError(made.reason)
    if made.mutations:
        raise LookupError("it writes to a tensor in place")
    if result not in made.value:
        raise LookupError("its result is no tensor that could be traced")
    parameters = tuple(made.value[p] for p in tracer.placeholders)
    seeds = frozenset(p for p, wanted in zip(parameters, followed, strict=True) if wanted)
    return Subgraph(replace(made, value={}, seeds=seeds), parameters, made.value[result])


class _Tracer(Tracer):
    """Runs a function that was recorded on other dtypes than it is called with (scores in half precision, int32 indices)."""

    def run_fake(self, *inputs: Any) -> Any:
        with _Indexing():
            return super().run_fake(*inputs)

    def difference(self, result: Any, n: fx.Node) -> str | None:
        return None


class _Indexing(TorchFunctionMode):
    """``tensor[i, j]`` with tensors of rank 0 looks elements up, as vmap does, instead of asking for Python numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            source, at = args[0], pytree.tree_leaves(args[1])
            if any(isinstance(x, torch.Tensor) for x in at) and all(isinstance(x, torch.Tensor | int) for x in at):
                where = [x if isinstance(x, torch.Tensor) else torch.tensor(x, device=source.device) for x in at]
                return torch.ops.aten.index.Tensor(source, where)
        return func(*args, **(kwargs or {}))


def derive(mirror: Mirror, at: fx.Node, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
    """A new mirror node just before ``at``: something that the graph does not hold, which a splice computes where it is used.

    Raises LookupError where its sizes need a fact that the user's guards do not give.
    """
    assert mirror.world is not None
    env = mirror.world.env
    known = len(env.guards)
    given, named = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (args, kwargs))
    # the dispatcher in Python: torch 2.11's product of matrices in C++ asks for sizes as numbers
    with torch._guards.tracing(None), torch.no_grad(), enable_python_dispatcher(), mirror.world.mode:
        value = target(*given, **named)
    if len(env.guards) > known and (reason := mirror.world.unproved()):
        raise LookupError(reason)
    with mirror.graph.inserting_before(at):
        node = mirror.graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    mirror.adopt(node, at)
    return node
