"""A causal mask that stands in the product with distances alone, before it is added, in the ways that models write it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional


def later(n: int) -> Tensor:
    return torch.arange(n)[None] > torch.arange(n)[:, None]


def kept(a: Tensor) -> Tensor:
    return torch.tril(torch.ones(a.shape[-2:], dtype=a.dtype))


WAYS = {
    "least number": lambda a: a.masked_fill(later(a.shape[-1]), torch.finfo(a.dtype).min),
    "-1e4": lambda a: a.masked_fill(later(a.shape[-1]), -1e4),
    "logarithm": lambda a: a + torch.log(kept(a)),
    "product and -1e9": lambda a: a * kept(a) - 1e9 * (1.0 - kept(a)),
    "zero, hiding nothing": lambda a: torch.where(later(a.shape[-1]), 0.0, a),
    "added": lambda a: a + torch.zeros_like(a[0, 0]).masked_fill(later(a.shape[-1]), -math.inf),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_stays(way: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
        b, h, n, _ = q.shape
        about = functional.pad(q @ embedding.transpose(-1, -2), (1, 0)).view(b, h, n + 1, n)[:, :, 1:]
        return ((q @ k.transpose(-1, -2) + WAYS[way](about)) * 0.25).softmax(-1) @ v

    q, k, v = (torch.randn(2, 2, 23, 16, dtype=torch.float64) for _ in range(3))
    embedding = torch.randn(23, 16, dtype=torch.float64)
    torch._dynamo.reset()
    found = torch.compile(model, backend="attnfx", options={"inner": "eager", "strict": True})(q, k, v, embedding)
    torch.testing.assert_close(found, model(q, k, v, embedding), rtol=1e-12, atol=1e-12)
