"""Where a Dynamo graph is inside a transform of torch.func: what may be looked into there, and what is left to torch.

A transform that is written inside a compiled function appears as nodes that push a level on functorch's stack and take it off
again.
Under `vmap` alone the nodes between mean what they mean for one example. Under `grad`, `vjp` and `jvp` the values are wrapped in
derivatives, which no operator of ours follows beyond the first: such a span is not run while a graph is looked at, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

_STATE = ("_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable", "_set_fwd_grad_enabled", "_enter_dual_level",
          "_exit_dual_level", "set_inplace_requires_grad_allowed", "_set_tensor_requires_grad")  # fmt: skip
_NAMES = {"grad": "grad or vjp", "jvp": "jvp", "vmap": "vmap", "func": "functionalize"}


def closed(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes of ``graph`` that must not be run to be read, each with the reason."""
    found: dict[fx.Node, str] = {}
    for span, kinds in _spans(graph):
        names = [_NAMES.get(kind, kind) for kind in kinds if kind != "vmap"]
        if names:
            found.update(dict.fromkeys(span, f"torch.func's {names[0]} is taken of it inside the compiled function"))
    for node in graph.nodes:
        if _name(node) in _STATE:
            found.setdefault(node, "it switches a state of autograd")
    return found


def forward_mode() -> str:
    """Why a graph that is compiled now stays as it was: derivatives are carried forward through it. Empty otherwise."""
    level = torch.autograd.forward_ad._current_level
    return (
        "" if level < 0 else "it is compiled inside torch.autograd.forward_ad.dual_level, and attnfx has derivatives backward only"
    )


def mapped(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes of ``graph`` that run once for each example of a vmap."""
    return frozenset(node for span, kinds in _spans(graph) if kinds == ["vmap"] * len(kinds) for node in span)


_PRODUCTS = ("matmul", "bmm", "einsum", "scaled_dot_product_attention", "softmax", "baddbmm", "mm", "linear")


def mapped_products(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes of every vmap in which something is multiplied: those are read for one example, the others through all."""
    spans = [span for span, kinds in _spans(graph) if kinds == ["vmap"] * len(kinds)]
    named = [span for span in spans if any(getattr(n.target, "__name__", n.target) in _PRODUCTS for n in span)]
    return frozenset(node for span in named for node in span)


#: Kinds of levels whose pop has another name.
_POPPED = {"functionalize": "func"}


@contextmanager
def restored() -> Iterator[None]:
    """Leaves functorch's stack as deep as it was, however what is inside ends."""
    functorch: Any = torch._C._functorch
    depth = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        while functorch.get_dynamic_layer_stack_depth() > depth:
            # torch 2.11's own way down to a depth goes one too far
            kind = functorch.peek_interpreter_stack().key().name.lower()
            getattr(functorch, f"_{_POPPED.get(kind, kind)}_decrement_nesting")()


def _spans(graph: fx.Graph) -> Iterator[tuple[list[fx.Node], list[str]]]:
    """The nodes from each outermost push to its pop, and the kinds of the levels in between."""
    depth, span, kinds = 0, list[fx.Node](), list[str]()
    for node in graph.nodes:
        name = _name(node)
        if name.endswith("_increment_nesting"):
            depth += 1
            kinds.append(name.removesuffix("_increment_nesting").lstrip("_"))
        if depth:
            span.append(node)
        if name.endswith("_decrement_nesting"):
            depth -= 1
            if depth == 0:
                yield span, kinds
                span, kinds = [], []
    if span:
        yield span, kinds


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
