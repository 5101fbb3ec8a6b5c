"""Tracing through ``vmap``: a Dynamo graph holds it opened up, as nodes that add and remove batch axes of hidden tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

#: Nodes that open and close a level; they have to run whatever else happens, so that levels stay balanced.
LEVELS = frozenset(("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"))


def direct(target: Any) -> Any:
    """What a wrapper around an operation of vmap runs: torch 2.11's writes itself down in place of running it."""
    if getattr(target, "__module__", "") != predispatch.__name__:
        return target
    found = getattr(predispatch, f"{target.__name__}_impl", target)
    if target.__name__ != "_add_batch_dim":
        return found
    return lambda tensor, axis, level: found(tensor, axis % tensor.ndim, level)


def inside() -> bool:
    """Whether a level of a functional transform is open."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def hidden(value: object) -> bool:
    """Whether a tensor carries a batch axis that its shape does not show."""
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_batchedtensor(value))


@contextmanager
def seen_through(mode: Any) -> Iterator[None]:
    """Trace below the transforms, where tensors show all their axes; elsewhere ``mode`` traces above autograd."""
    if not inside():
        yield
        return
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)
    with torch._C._ExcludeDispatchKeyGuard(keys), ProxyTorchDispatchMode(mode.tracer, "real"):
        yield
