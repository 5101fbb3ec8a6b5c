"""Backward through the flash kernels: dq, dk, dv, and each planned gradient of a side tensor in that tensor's layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.lowering import bands, codegen, flash, portable
from attnfx.lowering.gradients import to_layout
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable import Result
from attnfx.lowering.window_gradient import window_gradient


def backward(
    plan: KernelPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    seed: Tensor | None,
    result: Result,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    text: str,
    row_blocks: Tensor | None = None,
    key_blocks: Tensor | None = None,
) -> list[Tensor]:
    """The same contract as `portable.backward`; ``text`` is the plan's JSON, the rest the lists of tiles that its mask keeps."""
    values = plan.values(sizes, k.shape[2], loads)
    numbers = codegen.ints(plan, values, loads)
    program, tensors = codegen.program_of(text), codegen.pointers(plan, loads)
    residuals = flash.Residuals(result.lse, result.row_max, result.row_sum, result.degenerate)
    dropout, band = plan.site.dropout, bands.arguments(plan.site, loads)
    grad_left = None if band is None or band[0] is None else q.new_empty(q.shape)
    found = flash.backward(
        program, q, k, v, result.out, residuals, grad_out, tensors, numbers, grad_lse=grad_lse, dropout_p=dropout, seed=seed,
        row_blocks=row_blocks, key_blocks=key_blocks, band=band, grad_left=grad_left,
    )  # fmt: skip
    grads = list(found)
    for g in plan.gradients:
        if g.kind == "row":
            total = portable.of_rows(result.out, grad_out, grad_lse, torch.float32)
            for axis, shared in ((0, g.batch_broadcast), (1, g.head_broadcast)):
                total = total.sum(axis, keepdim=True) if shared else total
        elif g.kind in flash.BIAS_KINDS:
            total = flash.bias_gradient(
                program, q, k, v, result.out, residuals, grad_out, tensors, numbers, kind=g.kind, batch_broadcast=g.batch_broadcast,
                head_broadcast=g.head_broadcast, grad_lse=grad_lse, dropout_p=dropout, seed=seed,
                inside=g.inside, blocks=row_blocks, band=band,
            )  # fmt: skip
        elif g.kind == "window":
            assert band is not None
            total = window_gradient(
                program, q, k, v, result.out, residuals, grad_out, tensors, numbers, band, batch_broadcast=g.batch_broadcast,
                head_broadcast=g.head_broadcast, grad_lse=grad_lse, dropout_p=dropout, seed=seed, blocks=row_blocks,
            )  # fmt: skip
        else:
            assert grad_left is not None
            total = grad_left
        grads.append(to_layout(g, total, loads[g.slot], values))
    return grads
