"""Sizes of a graph as the numbers that its caller knows them by: comparing one puts a guard on the compiled graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.errors import PolicyError
from attnfx.graphs.mirror import Mirror, as_sympy


def guarded(mirror: Mirror, graph: fx.Graph, e: sympy.Expr) -> Any:
    """An int, or a SymInt of the inputs of ``graph``. PolicyError where a size is no size of an input."""
    if e.is_Integer:
        return int(e)
    if e.is_Symbol:
        user = mirror.to_user.get(e)
        found = next((size for size in _inputs(graph) if as_sympy(size) == user), None)
        if found is None:
            raise PolicyError(f'A rule with "when" compares the size {e}, which is no size of an input of this graph.')
        return found
    parts = [guarded(mirror, graph, a) for a in e.args]
    if isinstance(e, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(e, Mod | PythonMod):
        return parts[0] % parts[1]
    if e.is_Pow:
        parts = [parts[0]] * int(e.args[1])
    join = max if isinstance(e, Max) else min if isinstance(e, Min) else operator.add if e.is_Add else operator.mul
    return functools.reduce(join, parts)


def _inputs(graph: fx.Graph) -> Iterator[torch.SymInt]:
    for placeholder in graph.find_nodes(op="placeholder"):
        example = placeholder.meta.get("example_value", placeholder.meta.get("val"))
        sizes = example.shape if isinstance(example, torch.Tensor) else (example,)
        yield from (size for size in sizes if isinstance(size, torch.SymInt))
