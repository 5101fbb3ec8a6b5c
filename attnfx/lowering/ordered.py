"""Attention that counts its tokens in an order of its own: by a kernel that reads them where they lie, or put in order before.

The kernels of forward compute each row's address. Backward, torch's operations on a CPU and whoever wants statistics of rows get
the tokens in order, which costs a copy of each operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering import blocks
from attnfx.lowering.plan import KernelPlan
from attnfx.sites.ordering import Order

#: Tokens of the tiles that kernels read: in each the place of the first token and those of the others are a sum.
TILES = (16, 32, 64, 128)


def wanted(text: str, query: Tensor, key: Tensor) -> bool:
    """Whether the plan ``text`` has an order. Raises ValueError where it is one of another number of tokens: a kernel would read
    beyond the end."""
    order = KernelPlan.from_json(text).site.order
    if order is not None and not query.shape[2] == key.shape[2] == order.tokens:
        raise ValueError(f"there are {query.shape[2]} queries and {key.shape[2]} keys; their order is one of {order.tokens} tokens")
    return order is not None


def fused(text: str, query: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel reads the tokens of a call of the plan ``text`` where they lie; ``tensors``: what may want a gradient."""
    plan = KernelPlan.from_json(text)
    if plan.family != "flash" or plan.has_outside or not blocks.kernels_run(query.device):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return plan.site.order is not None and all(map(plan.site.order.additive, TILES))


def put(
    operator: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, loads: Any, sizes: Any, text: str, *rest: Any
) -> Any:
    """What ``operator`` gives of the tokens in the order of the plan ``text``, every result as the tokens lie."""
    order = KernelPlan.from_json(text).site.order
    assert order is not None
    results = operator(*(order.moved(t) for t in (query, key, value)), loads, sizes, unordered(text), *rest)
    return _back(order, results) if isinstance(results, Tensor) else tuple(_back(order, t) for t in results)


@lru_cache(maxsize=1024)
def unordered(text: str) -> str:
    """The plan of the same attention of tokens that lie as they are counted."""
    plan = KernelPlan.from_json(text)
    return replace(plan, site=plan.site.replace(order=None)).to_json()


def _back(order: Order, result: Tensor) -> Tensor:
    """(B, H, N, D) or, of a number for each row, (B, H, N)."""
    return order.back(result) if result.dim() == 4 else order.back(result.unsqueeze(-1)).squeeze(-1)
