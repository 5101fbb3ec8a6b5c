"""The catalogue's cases, and cases of few queries over many keys, run by the split-KV kernels against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import programs
import torch
from flash_cases import TOLERANCE, Case, dropout_mask, error, meaning, tensors
from flash_catalogue import CAUSAL, NONE, WINDOW, cases, causal_case, filled, padding_load
from torch import Tensor

from attnfx.lowering import decode, flash
from attnfx.lowering.call import Call, Residuals
from attnfx.lowering.decode import Tile

#: One fill of each kind: none, finite and reachable or not, replaced or added, -inf.
MASKS = ("sdpa zero", "replaced by finfo.min", "-1e4 added", "-inf added")
#: Of the catalogue, by the start of their names.
CHOSEN = ("plain GQA", "layout transposed", "window 5", "padded causal -inf added", "alibi", "diagonal bias causal head=False",
          "tile bias finfo.min added batch=False head=False")  # fmt: skip


def rows_of(case: Case, residuals: Residuals) -> Tensor:
    return residuals.row_max + residuals.row_sum.abs().log()


def split_forward(
    case: Case,
    given: tuple[Tensor, Tensor, Tensor],
    side: tuple[Any, ...],
    noise: dict[str, Any],
    splits: int | None,
    tile: Tile | None,
) -> tuple[Tensor, Residuals]:
    """`flash.forward` by the split-KV kernels whatever the sizes."""
    q, k, v = given
    loads, ints = side
    call = Call.of("forward", case.program, q, k, v, loads, ints, noise["dropout_p"], noise["seed"], None)
    out = q.new_empty((call.batch, call.m, call.heads, call.dv), dtype=v.dtype).transpose(1, 2)
    residuals = call.new_residuals()
    decode.launch(call, case.program, q, k, v, out, residuals, splits, tile)
    return out, residuals


def run(case: Case, device: torch.device, splits: int | None, tile: Tile | None, gradients: bool = False) -> dict[str, float]:
    """Every output's error over its tolerance, at most 1 passes: O, LSE, the LSE that row maxima and sums give; with
    `gradients` also what the backward kernels make of these."""
    torch.manual_seed(0)
    q, k, v = tensors(case, device)
    loads = case.loads(case, device)
    ints = case.ints(case, loads) if callable(case.ints) else case.ints
    seed = torch.tensor([1234567890123], device=device) if case.dropout else None
    dropped = dropout_mask(case, q, k, loads, ints, seed) if seed is not None else None
    noise = {"dropout_p": case.dropout, "seed": seed}
    out, residuals = split_forward(case, (q, k, v), (loads, ints), noise, splits, tile)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want, want_lse = meaning(
        case, exact[0], exact[1], exact[2], tuple(t.double() if t.is_floating_point() else t for t in loads), dropped
    )
    single = TOLERANCE[torch.float32][0]
    forward_limit, gradient_limit = (limit * case.slack for limit in TOLERANCE[case.dtype])
    errors = {"out": error(out, want) / forward_limit, "lse": error(residuals.lse, want_lse) / single}
    if case.program.exact_rows:
        alive = want_lse > -1e30
        errors["rows"] = error(rows_of(case, residuals)[alive], want_lse[alive]) / single
        marked = (residuals.row_sum < 0).any(-1).to(torch.int32)
        errors["flag"] = 0.0 if torch.equal(marked, residuals.degenerate) else math.inf
    if gradients:
        grad_out = torch.randn_like(out)
        wanted = torch.autograd.grad((want * grad_out.double()).sum(), exact)
        found = flash.backward(case.program, q, k, v, out, residuals, grad_out, loads, ints, **noise)
        errors |= {n: error(a, b) / gradient_limit for n, a, b in zip(("dq", "dk", "dv"), found, wanted, strict=True)}
    return errors


def few_queries() -> Iterator[Case]:
    """One to five queries, odd numbers of keys, every head dimension of real models, every mask of generation."""
    for m, n, d, dv in ((1, 201, 64, 64), (3, 157, 80, 80), (1, 133, 128, 128), (5, 257, 40, 24)):
        yield Case(f"few plain M{m} N{n} D{d}", NONE, (2, 4, 2, m, n, d, dv))
        yield causal_case(n - m, name="few", sizes=(1, 8, 2, m, n, d, dv))
    for dtype in (torch.float16, torch.bfloat16):
        yield causal_case(298, name="few", sizes=(2, 6, 2, 3, 301, 64, 64), dtype=dtype)
    yield Case("few MHA", NONE, (2, 3, 3, 1, 301, 16, 16))
    yield Case("few MQA over two row tiles", NONE, (1, 24, 1, 3, 301, 16, 16))
    yield Case("few window", WINDOW, (1, 4, 2, 5, 301, 16, 16), ints=(300,), keep=_window, extras={"window": 300})
    for fill in MASKS:
        slack = 300.0 if "1e4" in fill else 1.0
        yield Case(
            f"few padding {fill}",
            replace(filled(NONE, fill), keep=programs.padding),
            (3, 4, 2, 2, 301, 24, 24),
            loads=padding_load,
            ints=lambda case, loads: (case.sizes[4],),
            keep=lambda case, loads: loads[0][:, None, None],
            extras={"all padded": True},
            slack=slack,
        )
        yield causal_case(-2, filled(CAUSAL, fill), f"few {fill}", sizes=(1, 4, 2, 5, 301, 16, 16), slack=slack)
    yield Case(
        "few of a long cache",
        replace(filled(NONE, "replaced by finfo.min"), keep=programs.padding),
        (2, 4, 2, 1, 613, 16, 16),
        loads=_filled_cache,
        ints=lambda case, loads: (case.sizes[4],),
        keep=lambda case, loads: loads[0][:, None, None],
    )
    yield replace(causal_case(230, name="few dropout", sizes=(1, 4, 2, 3, 240, 16, 16)), dropout=0.3)
    yield replace(
        causal_case(-2, filled(CAUSAL, "finfo.min added"), "few dropout degenerate", sizes=(1, 4, 2, 3, 40, 16, 16)), dropout=0.3
    )


def _window(case: Case, loads: tuple[Tensor, ...]) -> Tensor:
    device = case.extras.get("device")
    distance = torch.arange(case.sizes[3], device=device)[:, None] - torch.arange(case.sizes[4], device=device)
    return (distance >= 0) & (distance < case.extras["window"])


def _filled_cache(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """bool (B, N): a cache of which only some positions in the middle, elsewhere in every batch, hold keys."""
    keep = torch.zeros(case.sizes[0], case.sizes[4], dtype=torch.bool, device=device)
    for b in range(case.sizes[0]):
        keep[b, 37 + 100 * b : 41 + 190 * b] = True
    return (keep,)


def catalogue() -> list[Case]:
    return [case for case in cases() if case.name.startswith(CHOSEN)]


__all__ = ["catalogue", "few_queries", "run"]
