"""The vmap rule of the operators: one call for each element of the mapped axis. Right for every argument; not fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Rule = Callable[..., tuple[Any, Any]]


def looped(name: str) -> Rule:
    """The rule for ``torch.ops.attnfx.<name>``: arguments split along their mapped axes, results stacked along axis 0."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.attnfx, name)
        results = [operator(*(_pick(a, d, n) for a, d in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
        leaves = [tree_flatten(r)[0] for r in results]
        spec = tree_flatten(results[0])[1]
        stacked = tree_unflatten([torch.stack(parts) for parts in zip(*leaves, strict=True)], spec)
        return stacked, tree_map(lambda _: 0, stacked)

    return rule


def _pick(value: Any, dim: Any, n: int) -> Any:
    """Element ``n`` of an argument: a tensor with a mapped axis, a list of such, or anything else as it is."""
    if isinstance(value, Tensor):
        return value if dim is None else value.select(dim, n)
    if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
        return [_pick(v, d, n) for v, d in zip(value, dim, strict=True)]
    return value
