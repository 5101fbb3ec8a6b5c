"""Runs the flash cases in Triton's interpreter (TRITON_INTERPRET=1) and prints one JSON line each; names select."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from flash_cases import Case, dropout_mask, run, tensors
from flash_catalogue import NONE, cases

from attnfx.lowering.configs import Config
from attnfx.lowering.flash import backward, bias_gradient, forward


def empties(device: torch.device) -> dict[str, float]:
    """Sizes of 0 must not launch, crash or leave memory unwritten: 0 passes."""
    wrong = 0.0
    for b, m, n, exact in ((0, 5, 7, False), (2, 0, 7, False), (2, 5, 0, False), (2, 5, 0, True)):
        program = replace(NONE, exact_rows=exact)
        q, k, v = (
            torch.randn(b, 4, m, 8, device=device),
            torch.randn(b, 2, n, 8, device=device),
            torch.randn(b, 2, n, 6),
        )
        v = v.to(device)
        out, residuals = forward(program, q, k, v, (), ())
        grads = backward(program, q, k, v, out, residuals, torch.ones_like(out), (), ())
        expected = torch.full((b, 4, m, 6), math.nan if exact else 0.0, device=device)
        wrong += not torch.equal(out.isnan(), expected.isnan()) or not torch.equal(out.nan_to_num(), expected.nan_to_num())
        wrong += sum(g.shape != t.shape or bool(g.any()) for g, t in zip(grads, (q, k, v), strict=True))
        for kind in ("tile", "column", "diagonal"):
            bias = bias_gradient(
                program, q, k, v, out, residuals, out, (), (), kind=kind, batch_broadcast=True, head_broadcast=False
            )
            wrong += bool(bias.any())
    return {"empty": wrong}


def dropout_statistics(device: torch.device) -> dict[str, float]:
    """The share of survivors, over rows, columns and heads, within five standard deviations of 1 - p; seeds differ."""
    case = Case("", NONE, (2, 4, 4, 64, 64, 16, 16), dropout=0.3, block=32)
    torch.manual_seed(0)
    q, k, _ = tensors(case, device)
    masks = [dropout_mask(case, q, k, (), (), torch.tensor([s], device=device)) > 0 for s in (1, 1, 2, 1 + 2**40)]
    deviation = 0.0
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        share = masks[0].double().mean(dims)
        sigma = math.sqrt(0.3 * 0.7 / (masks[0].numel() / share.numel()))
        deviation = max(deviation, float((share - 0.7).abs().max()) / sigma)
    same = torch.equal(masks[0], masks[1])
    agreement = max(float((masks[0] == other).double().mean()) for other in masks[2:])
    return {"deviation": deviation / 5, "repeatable": 0.0 if same else math.inf, "seeds": agreement / 0.6}


def main(names: list[str]) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # poisons torch.empty with NaN
    device = torch.device("cpu")
    # Triton 3.7's interpreter multiplies the bits of bfloat16 as integers: those cases are for a GPU
    chosen = [case for case in cases() if case.dtype != torch.bfloat16]
    jobs: dict[str, Callable[[], dict[str, float]]] = {
        case.name: lambda case=case: run(case, device, Config(case.block, case.block, 4, 2)) for case in chosen
    }
    for case in chosen:
        if max(case.sizes[3:5]) <= 64:
            # no configuration: the kernels for few rows, whose backward pass takes as many key as query heads
            b, h, _, *rest = case.sizes
            alike = replace(case, sizes=(b + 1, h, h, *rest))
            jobs[f"short {case.name}"] = lambda case=alike: run(case, device)
    jobs["empty sizes"] = lambda: empties(device)
    jobs["dropout statistics"] = lambda: dropout_statistics(device)
    for name, job in jobs.items():
        if names and not any(name.startswith(part) for part in names):
            continue
        try:
            row: dict[str, Any] = {"case": name, "errors": job()}
        except Exception:
            row = {"case": name, "failure": traceback.format_exc()[-3000:]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
