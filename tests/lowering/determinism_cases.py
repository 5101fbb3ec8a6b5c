"""Attentions whose biases learn, each run several times: are output and gradients the same in every bit? As a script, under
TRITON_INTERPRET=1, a JSON line for each case."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from form_sites import LEARNED, WINDOW
from lowering_sites import BATCH, HEADS, KEYS, QUERIES, SCALED, B, H, I, J, alibi, causal, inputs, load, side, site, t5
from torch import Tensor

from attnfx import expr
from attnfx.expr import Int
from attnfx.lowering import ops
from attnfx.lowering.plan import Family, KernelPlan, make_plan
from attnfx.site import AttentionSite

FOLDED = Int(B.value * HEADS + H.value)
KEY_HEADS = expr.floordiv(H, expr.integer(2))
CASES: dict[str, AttentionSite] = {
    # one number a head, read at every distance: its gradients are added up over distances
    "slopes": site(alibi(), causal(), side=(LEARNED,)),
    # 32 numbers a head for all distances: many of them share a bucket
    "buckets": site(t5(), side=(side(32, HEADS, grad=True),)),
    "distances": site(SCALED + load(0, H, Int(I.value - J.value + KEYS - 1)), side=(side(HEADS, QUERIES + KEYS - 1, grad=True),)),
    "window": site(
        SCALED + WINDOW, batch=16, side=(side(9, HEADS, grad=True), side(QUERIES, KEYS, dtype=torch.int64)),
    ),
    "pairs": site(SCALED + load(0, H, I, J), side=(side(HEADS, QUERIES, KEYS, grad=True),)),
    "keys": site(SCALED + load(0, J) * 0.5, causal(), side=(side(KEYS, grad=True),)),
    # b and h folded into one axis, and heads that share an element: added up by index
    "folded": site(SCALED + load(0, FOLDED, J), side=(side(BATCH * HEADS, KEYS, grad=True),)),
    "shared heads": site(SCALED + load(0, KEY_HEADS, I, J), side=(side(HEADS // 2, QUERIES, KEYS, grad=True),)),
}  # fmt: skip


def results(s: AttentionSite, family: Family, device: torch.device) -> list[Tensor]:
    """Output, LSE and every gradient, of the same inputs at every call."""
    plan = make_plan(s, family)
    assert isinstance(plan, KernelPlan), plan
    torch.manual_seed(0)
    q, k, v = (t.detach().to(device).requires_grad_() for t in inputs(s, torch.float32))
    given = []
    for tensor in s.side:
        shape = [int(n) for n in tensor.shape]
        made = torch.randint(0, 9, shape) if tensor.dtype == torch.int64 else torch.randn(shape)
        given.append(made.to(device).requires_grad_(tensor.requires_grad))
    out, lse = ops.attention_lse(q, k, v, given, [], plan.to_json())
    push = torch.randn(out.shape).to(device)
    learned = [t for t in given if t.requires_grad]
    return [out, lse, *torch.autograd.grad((out * push).sum() + lse.sum(), [q, k, v, *learned])]


def different(s: AttentionSite, family: Family, device: torch.device, times: int = 3) -> list[str]:
    """What differs in any bit between equal calls with deterministic algorithms alone: torch raises where it has none."""
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (results(s, family, device) for _ in range(times))
    finally:
        torch.use_deterministic_algorithms(False)
    names = ["out", "lse", "q", "k", "v", *(f"side tensor {n}" for n in range(len(first) - 5))]
    return [name for name, a, *rest in zip(names, first, *others, strict=True) if not all(torch.equal(a, b) for b in rest)]


def main(names: list[str]) -> None:
    for name in names or CASES:
        row: dict[str, Any] = {"name": name}
        try:
            row["different"] = different(CASES[name], "flash", torch.device("cpu"), times=2)
        except Exception:
            row["failure"] = traceback.format_exc()[-3000:]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
