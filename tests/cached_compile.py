"""Compiles one attention through Inductor and prints the cache counters as JSON; run twice in one cache by test_caches.py."""

from __future__ import annotations

import json

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from attnfx.backend import attnfx


def attend(x: Tensor, keep: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    scores = (x @ x.mT).masked_fill((i > i[:, None]) | ~keep[:, None], float("-inf"))
    return scores.softmax(-1) @ x


def main() -> None:
    torch.manual_seed(0)
    x, keep = torch.randn(2, 9, 4, requires_grad=True), torch.ones(2, 9, dtype=torch.bool)
    out = torch.compile(attend, backend=attnfx, options={"strict": True})(x, keep)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(attend(x, keep).sum(), x)
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    found = {name: counters["inductor"][name] for name in names}
    found |= {name: n for name, n in counters["aot_autograd"].items() if "cache" in name}
    print(json.dumps({**found, "error": (grad - want).abs().max().item()}))


if __name__ == "__main__":
    main()
