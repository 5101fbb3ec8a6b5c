"""Backward through the flash kernels: dq, dk, dv, and each planned gradient of a side tensor in that tensor's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering import bands, codegen, flash, handed, portable, short
from attnfx.lowering.call import Residuals
from attnfx.lowering.gradients import BiasGradient, to_layout
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
    program, tensors = codegen.program_of(text), handed.pointers(plan, k.shape[2], loads)
    numbers = handed.ints(plan, values, tensors)
    residuals = Residuals(result.lse, result.row_max, result.row_sum, result.degenerate)
    common: dict[str, Any] = {"grad_lse": grad_lse, "dropout_p": plan.site.dropout, "seed": seed}
    given = (program, q, k, v, result.out, residuals, grad_out, tensors, numbers)
    shared: Tensor | None = None
    inside = next((g.inside for g in plan.gradients if _of_all_examples(g)), None)
    band = bands.arguments(plan.site, loads)
    grad_left = None if band is None or band[0] is None else q.new_empty(q.shape)
    if band is None and q.shape[1] == k.shape[1] and flash.is_short(q, k, v):
        *grads, shared = flash.backward_short(*given, inside=inside, **common)
    else:
        found = flash.backward(*given, row_blocks=row_blocks, key_blocks=key_blocks, band=band, grad_left=grad_left, **common)
        grads = list(found)
    for g in plan.gradients:
        if g.kind == "row":
            total = portable.of_rows(result.out, grad_out, grad_lse, torch.float32)
            for axis, alone in ((0, g.batch_broadcast), (1, g.head_broadcast)):
                total = total.sum(axis, keepdim=True) if alone else total
        elif shared is not None and _of_all_examples(g) and g.inside == inside:
            total = short.bias_sums(g, shared)
        elif g.kind in flash.BIAS_KINDS:
            total = flash.bias_gradient(
                *given, kind=g.kind, batch_broadcast=g.batch_broadcast, head_broadcast=g.head_broadcast, inside=g.inside,
                blocks=row_blocks, band=band, **common,
            )  # fmt: skip
        elif g.kind == "window":
            assert band is not None
            total = window_gradient(
                *given, band, batch_broadcast=g.batch_broadcast, head_broadcast=g.head_broadcast, blocks=row_blocks, **common,
            )  # fmt: skip
        else:
            assert grad_left is not None
            total = grad_left
        grads.append(to_layout(g, total, loads[g.slot], values))
    return grads


def _of_all_examples(g: BiasGradient) -> bool:
    """Whether it is a sum over the batch of the gradients of the logits."""
    return g.batch_broadcast and g.kind in flash.BIAS_KINDS
