"""Run as a script under TRITON_INTERPRET=1: compiled models whose masks are constants, a JSON line an example."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from lowering_sites import distance
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnfx
from attnfx import variants
from attnfx.backend import attnfx as backend
from attnfx.lowering import blocks

TOKENS = 1024
TABLE = tuple(tuple(int(abs(a - b) < 2) for b in range(8)) for a in range(8))
CASES = {
    "blocks": variants.BlockSparse(TABLE),
    "blocks of each head": variants.BlockSparse((TABLE, tuple(row[::-1] for row in TABLE))),
    "neighbours": variants.NeighborhoodAttention((8, 16, 8), 3),
    "neighbours and text": variants.NeighborhoodAttention((8, 16, 7), 3, extra=128),
}


class Two(nn.Module):
    """Two layers of attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(scaled_dot_product_attention(q, k, v), k, v)


def errors(variant: variants.base.Variant, trained: bool) -> dict[str, float]:
    """Distances from the oracle; how many lists too many, or too few, were made while the model was compiled, and called again."""
    built: list[Any] = []
    build = blocks.build

    def told(*args: Any) -> Tensor:
        built.append(args)
        return build(*args)

    blocks.build = told
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = [torch.randn(1, 2, TOKENS, 16, requires_grad=trained) for _ in range(3)]
    policy = attnfx.Policy([attnfx.Rule("*", variant)])
    model = torch.compile(Two(), backend=backend, dynamic=False, options={"policy": policy, "strict_sites": 2})
    try:
        with torch.set_grad_enabled(trained):
            model(*given)
            first, _ = len(built), built.clear()
            out = model(*given)
        wide = [t.detach().double().requires_grad_(trained) for t in given]
        inner = variant.reference(*wide, 0.25)
        want = variant.reference(inner, *wide[1:], 0.25)
        found = {"out": distance(out, want), "made": abs(first - (4 if trained else 2)), "again": float(len(built))}
        if trained:
            push = torch.randn_like(out)
            mine = torch.autograd.grad(out, given, push)
            theirs = torch.autograd.grad(want, wide, push.double())
            found |= {f"d{n}": distance(a, b) for n, a, b in zip("qkv", mine, theirs, strict=True)}
    finally:
        blocks.build = build
    return found


def main() -> None:
    for name, variant in CASES.items():
        for trained in (False, True):
            told = f"{name}, trained" if trained else name
            try:
                line = {"name": told, "errors": errors(variant, trained)}
            except Exception:
                line = {"name": told, "failure": traceback.format_exc()}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
