"""Blockwise backward: the weights of a block again from the stored row statistics, then the five products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.lowering.gradients import BiasGradient, to_layout
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable.blocks import Block, Problem
from attnfx.lowering.portable.forward import Result, dots, literal_logits, masked_logits


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
) -> list[Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, then the gradient of each of ``plan.gradients`` in its side tensor's dtype and shape."""
    problem = Problem(plan, q, k, v, loads, tuple(sizes), seed)
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    biases = [_new_sum(g, problem) for g in plan.gradients]
    for batches, heads in problem.chunks() if not problem.empty else ():
        _chunk(problem, batches, heads, result, grad_out, grad_lse, grads, biases)
    for gradient, total in zip(plan.gradients, biases, strict=True):
        if gradient.kind == "row" and grad_lse is not None:
            # softmax does not see a term that all keys share; the log of its sum does
            total += _over(gradient, grad_lse.to(total.dtype))
    made = [to_layout(g, total, loads[g.slot]) for g, total in zip(plan.gradients, biases, strict=True)]
    return [*grads, *made]


def _chunk(
    problem: Problem,
    batches: range,
    heads: range,
    result: Result,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: list[Tensor],
    biases: list[Tensor],
) -> None:
    keys, values = problem.keys_of(problem.k, batches, heads), problem.keys_of(problem.v, batches, heads)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    for block in problem.blocks(batches, heads):
        at = _place(block)
        wide_grad = grad_out[at].to(problem.dtype)
        delta = (wide_grad * result.out[at].to(problem.dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[at].to(problem.dtype)[..., None]
        whole, p, live, slope = _weights(problem, block, keys, result)
        run = slice(whole.keys.start, whole.keys.stop)
        stacked_grad = problem.stacked(wide_grad)
        dweight = problem.unstacked(stacked_grad @ values[:, :, run].transpose(-1, -2))
        scale = problem.dropout(whole)
        survived = p if scale is None else p * scale
        grad_v[:, :, run] += problem.stacked(survived).transpose(-1, -2) @ stacked_grad
        dz = dweight.sub_(delta).mul_(p) if scale is None else (dweight * scale - delta) * p
        if live is not None:
            dz = dz.masked_fill(~live, 0.0)
        for gradient, total in zip(problem.plan.gradients, biases, strict=True):
            _accumulate(gradient, total, dz, whole, problem)
        ds = problem.stacked(dz * slope)
        grads[0][at] = problem.unstacked(ds @ keys[:, :, run]).to(grads[0].dtype)
        grad_k[:, :, run] += ds.transpose(-1, -2) @ problem.rows_of(problem.q, block)
    place = (slice(batches.start, batches.stop), slice(heads.start // problem.group, heads.stop // problem.group))
    grads[1][place], grads[2][place] = grad_k.to(grads[1].dtype), grad_v.to(grads[2].dtype)


def _place(block: Block) -> tuple[slice, slice, slice]:
    return (
        slice(block.batches.start, block.batches.stop),
        slice(block.heads.start, block.heads.stop),
        slice(block.rows.start, block.rows.stop),
    )


def _weights(problem: Problem, block: Block, keys: Tensor, result: Result) -> tuple[Block, Tensor, Tensor | None, Tensor]:
    """The block (of all keys where eager's fill has weight), its weights, what lets gradients through, and d logits / d dot."""
    plan, at = problem.plan, _place(block)
    if plan.exact_rows and bool((result.row_sum[at] < 0).any()):
        block = problem.all_keys(block)
        dot = dots(problem, block, keys)
        z, keep = literal_logits(problem, block, dot)
        p = (z - result.row_max[at][..., None]).exp_() / result.row_sum[at].abs()[..., None]
        return block, p, None if plan.site.additive else keep, problem.slope(block, dot)
    lse = result.lse[at][..., None]
    if not plan.exact_rows:
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    dot = dots(problem, block, keys)
    p = (masked_logits(problem, block, dot) - lse).exp_()
    return block, p, None, problem.slope(block, dot)


def _new_sum(gradient: BiasGradient, problem: Problem) -> Tensor:
    b = 1 if gradient.batch_broadcast else problem.batch
    h = 1 if gradient.head_broadcast else problem.heads
    tail = {
        "tile": (problem.rows, problem.keys), "column": (problem.keys,), "row": (problem.rows,),
        "diagonal": (max(problem.rows + problem.keys - 1, 0),),
    }[gradient.kind]  # fmt: skip
    return problem.q.new_zeros((b, h, *tail), dtype=problem.dtype)


def _over(gradient: BiasGradient, t: Tensor) -> Tensor:
    """Summed over the batches and heads that the side tensor does not know."""
    for axis, shared in ((0, gradient.batch_broadcast), (1, gradient.head_broadcast)):
        t = t.sum(axis, keepdim=True) if shared else t
    return t


def _accumulate(gradient: BiasGradient, total: Tensor, dz: Tensor, block: Block, problem: Problem) -> None:
    if gradient.kind == "row" or not len(block.keys):
        return
    b = slice(0, 1) if gradient.batch_broadcast else slice(block.batches.start, block.batches.stop)
    h = slice(0, 1) if gradient.head_broadcast else slice(block.heads.start, block.heads.stop)
    part, keys = _over(gradient, dz), slice(block.keys.start, block.keys.stop)
    if gradient.kind == "tile":
        total[b, h, block.rows.start : block.rows.stop, keys] += part
    elif gradient.kind == "column":
        total[b, h, keys] += part.sum(-2)
    else:
        first = block.rows[0] - block.keys[-1] + problem.keys - 1
        sums = diagonal_sums(part)
        total[b, h, first : first + sums.shape[-1]] += sums


def diagonal_sums(t: Tensor) -> Tensor:
    """(..., R, C) -> (..., R + C - 1): sums over equal r - c, ascending.

    Rows padded by R and read with one column less: row r moves r to the right.
    """
    r, c = t.shape[-2:]
    padded = torch.nn.functional.pad(t.flip(-1), (0, r))
    return padded.flatten(-2)[..., : r * (c + r - 1)].unflatten(-1, (r, c + r - 1)).sum(-2)
