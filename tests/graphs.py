"""Helpers of the tests: graphs as Dynamo makes them, and compiled functions compared with the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnfx.backend import attnfx, listeners
from attnfx.report import Report


def dynamo_graph(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> fx.GraphModule:
    """The first graph that Dynamo hands to a backend for ``function(*args)``."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    return graphs[0]


def compiled(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> tuple[Any, Report]:
    """``function(*args)`` through attnfx with the eager inner backend and strict errors, and the report."""
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    try:
        given = {"inner": "eager", "strict": True, **options}
        result = torch.compile(function, backend=attnfx, dynamic=dynamic, options=given)(*args)
    finally:
        listeners.reset(token)
    return result, Report.merge(reports)


def assert_same(got: Any, want: Any, tolerance: float | None = None) -> None:
    """Equal up to rounding, NaNs in the same places."""
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        if isinstance(a, Tensor):
            limit = tolerance or (4e-6 if a.dtype in (torch.float32, torch.float64) else 3e-2)
            torch.testing.assert_close(a.double(), b.double(), rtol=limit, atol=limit, equal_nan=True)


def torch_divides_by_no_heads() -> bool:
    """torch 2.11's own attention for CPUs ends the process where there are no heads."""
    return tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 12)
