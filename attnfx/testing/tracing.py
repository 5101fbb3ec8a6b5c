"""A graph like Dynamo's, without Dynamo: one eager run whose calls are written down as it goes.

Dynamo reads bytecode and costs 50 to 100 ms a function. Straight-line code needs none of that: a ``TorchFunctionMode`` sees every
call of torch that Dynamo would put in its graph, so the eager run that a comparison needs anyway also makes the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def record(function: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[fx.GraphModule, Any]:
    """The graph of ``function(**inputs)`` with ``example_value`` on every node as Dynamo leaves it, and the result of the run.

    For code whose control flow does not depend on tensors. Sizes are numbers: a graph with size symbols needs Dynamo.
    Example values are the tensors of the run itself. Raises TypeError where a result is computed by something unseen.
    """
    recorder = _Recorder()
    for name, value in inputs.items():
        recorder.keep(recorder.graph.placeholder(f"l_{name}_"), value)
    with recorder:
        result = function(**inputs)
    recorder.graph.output(tuple(pytree.tree_leaves(recorder.nodes_of(result))))
    recorder.graph.eliminate_dead_code(is_impure_node=_impure)
    return fx.GraphModule(torch.nn.Module(), recorder.graph), result


def _impure(node: fx.Node) -> bool:
    """What stays in a graph although nothing reads it: inputs, and whatever may write to memory or switch a mode."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = node.kwargs.get("inplace") is True
    return (
        node.op in ("placeholder", "output")
        or inplace
        or (name.endswith("_") and not name.endswith("__"))
        or name in _WRITES
        or name == "_set_grad_enabled"
    )


_REFLECTED = {"__radd__": operator.add, "__rsub__": operator.sub, "__rmul__": operator.mul, "__rtruediv__": operator.truediv,
              "__rdiv__": operator.truediv, "__rpow__": operator.pow, "__rmatmul__": operator.matmul}  # fmt: skip
_WRITES = ("setitem", "iadd", "isub", "imul", "itruediv", "iand", "ior")


class _Recorder(TorchFunctionMode):
    """Runs every call of torch and notes it as a node."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # an id is only a name for as long as its object lives

    def keep(self, node: fx.Node, value: Any) -> None:
        node.meta["example_value"] = value
        self.nodes[id(value)] = node
        self.alive.append(value)

    def nodes_of(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.node_of, tree)

    def node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.nodes:
            raise TypeError("a tensor of the program is neither an input nor the result of a call of torch")
        return self.nodes[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            self.graph.call_function(func, tuple(args))
            return result
        leaves = pytree.tree_leaves(result)
        writes = func is torch.Tensor.__setitem__
        if not writes and not any(isinstance(leaf, Tensor) for leaf in leaves):
            return result
        node = self.made(func, tuple(self.nodes_of(list(args))), self.nodes_of(dict(kwargs)))
        if isinstance(result, Tensor):
            self.keep(node, result)
        elif not writes:
            node.meta["example_value"] = result
            for number, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.keep(self.graph.call_function(operator.getitem, (node, number)), part)
        return result

    def made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property, such as x.mT
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        if name in _REFLECTED:
            return self.graph.call_function(_REFLECTED[name], args[::-1])
        if getattr(torch.Tensor, name, None) is func:
            plain = getattr(operator, name.strip("_"), None) if name.startswith("__") else None
            if plain is not None:
                return self.graph.call_function(plain, args, kwargs)
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)
