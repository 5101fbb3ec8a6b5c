"""What the soundness cases are written with: a registry of functions that look like attention and are not quite.

Each case has a number of attentions that must be rewritten (None: any).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

INF = float("inf")
NAN = float("nan")
LOWEST = torch.finfo(torch.float32).min
Case = tuple[int | None, Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Case] = {}
FORWARD_ONLY: set[str] = set()

torch.manual_seed(0)
T = torch.randn
A = torch.arange
SDPA = F.scaled_dot_product_attention


def qkv(
    b: int = 2, h: int = 3, m: int = 5, n: int | None = None, d: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    n = m if n is None else n
    return T(b, h, m, d, dtype=dtype), T(b, h, n, d, dtype=dtype), T(b, h, n, d, dtype=dtype)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * 0.5).softmax(-1) @ v


def later(m: int, n: int) -> Tensor:
    return A(n)[None, :] > A(m)[:, None]


def case(sites: int | None, *args: Any, grad: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        add(f.__name__, sites, f, *args, grad=grad)
        return f

    return register


def add(name: str, sites: int | None, f: Callable[..., Any], *args: Any, grad: bool = True) -> None:
    assert name not in CASES
    CASES[name] = sites, f, args
    if not grad:
        FORWARD_ONLY.add(name)


def masked(f: Callable[[Tensor, Tensor], Tensor], fill: float = -3.0) -> Callable[..., Tensor]:
    return lambda q, k, v: scores(q, k).masked_fill(f(A(5)[:, None], A(5)[None, :]), fill).softmax(-1) @ v


def biased(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """The bias is computed by ``f`` from everything after q, k and v."""
    return lambda q, k, v, *more: (scores(q, k) + f(*more)).softmax(-1) @ v


def distance(*_: Any) -> Tensor:
    return A(5)[None, :] - A(5)[:, None]


def masked_by(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return scores(q, k).masked_fill(m, -9.0).softmax(-1) @ v
