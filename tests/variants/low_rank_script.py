"""LowRankBias by the Triton kernels, in the interpreter, beside the portable operations: one line of JSON a case. Run by
test_low_rank_interpreter.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from test_low_rank_bias import Window, expected, inputs, model
from torch import Tensor, nn

import attnfx
from attnfx.backend import listeners
from attnfx.report import Report
from attnfx.variants import LowRankBias

CASES: dict[str, dict[str, Any]] = {
    "products": {"rank": 3},
    "columns": {"rank": 12},
    "products of shared keys": {"rank": 2, "heads": 4, "key_heads": 2},
    "columns of shared keys, masked": {"rank": 10, "heads": 4, "key_heads": 2, "masks": 2},
}


def run(m: nn.Module, x: Tensor, rank: int) -> tuple[str, list[Tensor]]:
    """What runs it, its output, and the gradients of its input and of the query weights."""
    torch._dynamo.reset()
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    policy = [attnfx.Rule("0", LowRankBias(rank=rank, tolerance=0))]
    try:
        out = attnfx.compile(m, policy, strict=True, inner="eager")(x)
    finally:
        listeners.reset(token)
    assert isinstance(m[0], Window)  # type: ignore[index]
    grads = torch.autograd.grad(out.float().square().sum(), [x, m[0].q.weight])  # type: ignore[index]
    return reports[0].sites[0].decision, [out.detach(), *grads]


def main() -> None:
    for name, case in CASES.items():
        for dtype in (torch.float16, torch.float32):
            sizes = {k: v for k, v in case.items() if k != "rank"}
            m, x = model(dtype, **sizes), inputs(dtype, windows=2).requires_grad_()
            os.environ["TRITON_INTERPRET"] = "1"
            by_kernel, kernel = run(m, x, case["rank"])
            del os.environ["TRITON_INTERPRET"]
            by_blocks, blocks = run(m, x, case["rank"])
            want = expected(model(dtype, **sizes), LowRankBias(rank=case["rank"], tolerance=0), x)
            errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(kernel, blocks, strict=True)]
            exact = float((kernel[0].double() - want).norm() / want.norm())
            row = {
                "case": name,
                "dtype": str(dtype),
                "by": [by_kernel, by_blocks],
                "errors": errors,
                "exact": exact if "shared" not in name else 0.0,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
