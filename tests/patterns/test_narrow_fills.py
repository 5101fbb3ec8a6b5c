"""Fills of a wide type where the softmax is computed in a narrower one: a query without keys gives what the model gives."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnfx

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float64)}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(dtype: torch.dtype, low: float, put: bool, converted: bool) -> Attention:
    """Causal; the first query of the second sequence sees no key. The scores become ``dtype`` by themselves or in the softmax."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, i, j = torch.arange(2).view(2, 1, 1, 1), torch.arange(5)[:, None], torch.arange(5)
        keep, s = (j <= i) & ((b == 0) | (i > 0)), q @ k.mT
        s = s.masked_fill(~keep, low) if put else s + torch.where(keep, torch.zeros((), dtype=q.dtype), low)
        p = s.to(dtype).softmax(-1) if converted else s.softmax(-1, dtype=dtype)
        return p.to(q.dtype) @ v

    return attend


def outcome(f: Attention, qkv: tuple[Tensor, ...]) -> list[Tensor]:
    """The result and the gradients of its sum over the values of a few weights."""
    given = [t.clone().requires_grad_() for t in qkv]
    out = f(*given)
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum(), given)]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("wide", "narrow", "low", "put", "fill"),
    [
        (torch.float64, torch.float32, LOWEST[torch.float64], True, -math.inf),
        (torch.float64, torch.float32, LOWEST[torch.float64], False, -math.inf),
        (torch.float64, torch.float32, -1e9, False, -1e9),
        (torch.float64, torch.float32, -1e4, False, -1e4),
        (torch.float32, torch.bfloat16, LOWEST[torch.float32], False, -math.inf),
        (torch.float32, torch.float16, -1e9, True, -math.inf),
        (torch.float32, torch.float16, -1e4, False, -1e4),  # float16 rounds to steps of 8 there
    ],
)
def test_a_query_without_keys(wide: torch.dtype, narrow: torch.dtype, low: float, put: bool, fill: float, converted: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    qkv = torch.randn(3, 2, 3, 5, 4, dtype=wide).unbind(0)
    eager = attention(narrow, low, put, converted)
    compiled = attnfx.compile(eager, inner="eager")
    want, got = outcome(eager, qkv), outcome(compiled, qkv)
    (site,) = attnfx.explain(compiled).sites
    assert (site.decision, site.site.fill) == ("portable", fill)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(narrow).eps, equal_nan=True)
