"""Run as a script under TRITON_INTERPRET=1: gradients of learned biases where a query is NaN, beside eager's autograd, a JSON line
a case."""

from __future__ import annotations

import itertools
import json
import math
import sys

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr, Load, Score
from attnfx.lowering import ops
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite, SideTensor

B, HEADS, D, LOST = 2, 2, 16, 5
H, I, J = (expr.index(name) for name in "hij")
FILLS = {"inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min}
#: What the bias is indexed by; queries and keys, a multiple of a tile and not; the fill; whether queries see only earlier keys.
CASES = tuple(itertools.product(("tile", "column", "diagonal"), (96, 77), FILLS, (False, True)))
Case = tuple[str, int, str, bool]


def learned(kind: str, length: int) -> tuple[Tensor, tuple[Expr, ...], Tensor]:
    """The bias, how the site reads it, and where eager does, (H,M,N)."""
    at = torch.arange(length)
    shape, indices, places = {
        "tile": ((HEADS, length, length), (H, I, J), (at[:, None], at)),
        "column": ((HEADS, length), (H, J), (at.expand(length, length),)),
        "diagonal": ((HEADS, 2 * length), (H, I - J + expr.integer(length)), (at[:, None] - at + length,)),
    }[kind]
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return bias, indices, places  # type: ignore[return-value]


def gradients(kind: str, length: int, fill: str, early: bool, family: str, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """The output and the gradient of the bias by a plan of a family, each with eager's."""
    bias, indices, places = learned(kind, length)
    n, noise, wanted = sympy.Integer, torch.Generator().manual_seed(0), length // LOST
    side = (SideTensor(tuple(map(n, bias.shape)), torch.float32, requires_grad=True),)
    keep = expr.le(J, I - expr.integer(int(early)))
    site = AttentionSite(
        n(B), n(HEADS), n(HEADS), n(length), n(length), D, D, torch.float32, device,
        Score() * 0.25 + Load(0, indices, torch.float32), keep, fill=FILLS[fill], side=side, requires_grad=True,
    )  # fmt: skip
    plan = make_plan(site, family)
    assert isinstance(plan, KernelPlan), plan
    q, k, v = (torch.randn(B, HEADS, length, D, generator=noise).to(device) for _ in range(3))
    q[1, 0, wanted] = math.nan
    push = torch.randn(B, HEADS, length, D, generator=noise).to(device)
    table, same = (bias.to(device).requires_grad_() for _ in range(2))
    out = ops.attention(q, k, v, (table,), (), plan.to_json())
    at = torch.arange(length, device=device)
    scores = q @ k.transpose(-1, -2) * 0.25 + same[:, *(p.to(device) for p in places)]
    scores = scores.masked_fill(at[None, :] > at[:, None] - int(early), FILLS[fill])
    eager = scores.softmax(-1) @ v
    grads = (torch.autograd.grad(o, t, push)[0] for o, t in ((out, table), (eager, same)))
    return [(out.detach(), eager.detach()), (next(grads), next(grads))]


def error(*case: str | int | bool, family: str = "flash", device: str = "cpu") -> float:
    """The larger relative distance from eager; infinite where NaNs are in other places."""
    away = []
    for got, want in gradients(*case, family, device):  # type: ignore[arg-type]
        if not torch.equal(got.isnan(), want.isnan()):
            return math.inf
        away.append(float((got.nan_to_num() - want.nan_to_num()).norm() / want.nan_to_num().norm()))
    return max(away)


def main() -> None:
    for case in CASES:
        print(json.dumps({"name": str(case), "errors": {"both": error(*case)}}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
