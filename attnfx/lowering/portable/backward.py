"""Blockwise backward: the weights of a block again from the stored row statistics, then the five products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.lowering.gradients import BiasGradient, to_layout
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable import bands
from attnfx.lowering.portable.aten import Fused
from attnfx.lowering.portable.blocks import Block, Problem
from attnfx.lowering.portable.forward import Result, dots, literal_logits, masked_logits, parts


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
    # dk and dv are sums over blocks of rows: in the working dtype until the end
    wide_k, wide_v = (t.new_zeros(t.shape, dtype=problem.dtype) for t in (k, v))
    sums = (torch.zeros_like(q, memory_format=torch.contiguous_format), wide_k, wide_v)
    biases = [_new_sum(g, problem) for g in plan.gradients]
    own = grad_lse is not None or plan.site.band is not None or any(g.kind != "row" for g in plan.gradients)
    fused = None if problem.empty or own else Fused.of(problem)
    for block in parts(problem, fused, lambda block: fused is not None and _fused(fused, block, result, grad_out, sums)):
        _block(problem, block, result, grad_out, grad_lse, sums, biases)
    grads = [sums[0], sums[1].to(k.dtype), sums[2].to(v.dtype)]
    for gradient, total in zip(plan.gradients, biases, strict=True):
        if gradient.kind == "row":
            total += _over(gradient, of_rows(result.out, grad_out, grad_lse, total.dtype))
    made = [to_layout(g, total, loads[g.slot], problem.values) for g, total in zip(plan.gradients, biases, strict=True)]
    return [*grads, *made]


def of_rows(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B,H,M): the gradient of a term that all keys of a row share. Softmax does not see it, the log of its sum does; a row
    that is NaN is NaN here too."""
    nothing = (grad_out.to(dtype) * out.to(dtype)).sum(-1) * 0.0
    return nothing if grad_lse is None else nothing + grad_lse.to(dtype)


Sums = tuple[Tensor, Tensor, Tensor]


def _fused(fused: Fused, block: Block, result: Result, grad_out: Tensor, sums: Sums) -> bool:
    """A block through torch's CPU kernel; False where it means something else by it."""
    same, mask = fused.mask(block)
    if not same:
        return False
    dq, dk, dv = fused.backward(block, mask, grad_out, result.out, result.lse)
    sums[0][block.place] = dq
    fused.problem.add(sums[1], dk, block)
    fused.problem.add(sums[2], dv, block)
    return True


def _block(
    problem: Problem, block: Block, result: Result, grad_out: Tensor, grad_lse: Tensor | None, sums: Sums, biases: list[Tensor]
) -> None:
    wide_grad = grad_out[block.place].to(problem.dtype)
    block, p, live, slope = _weights(problem, block, result)
    stacked_grad = problem.stacked(wide_grad)
    dweight = problem.unstacked(stacked_grad @ problem.keys_of(problem.v, block).transpose(-1, -2))
    scale = problem.factor(block)
    survived = p if scale is None else p * scale
    problem.add(sums[2], problem.stacked(survived).transpose(-1, -2) @ stacked_grad, block)
    dz = dweight if scale is None else dweight * scale
    # the sum of dO * O, from the same weights: where one key has all of a row, the difference is zero and not a rounding error
    delta = (dz * p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[block.place].to(problem.dtype)[..., None]
    dz = dz.sub_(delta).mul_(p)
    if live is None and biases and not problem.plan.site.additive and not bool(delta.isfinite().all()):
        live = problem.keep(block)  # a fill in place of scores has no gradient, in a row of NaN either
    if live is not None:
        dz = dz.masked_fill(~live, 0.0)
    # where the score was put away its gradient is zero and not NaN times zero
    inner = (dz * slope).masked_fill_(slope == 0.0, 0.0)
    for gradient, total in zip(problem.plan.gradients, biases, strict=True):
        _accumulate(gradient, total, inner if gradient.inside else dz, block, problem)
    ds = problem.stacked(inner)
    grad_q, beside = problem.unstacked(ds @ problem.keys_of(problem.k, block)), bands.gradients(problem, block, inner, biases)
    sums[0][block.place] = (grad_q if beside is None else grad_q + beside).to(sums[0].dtype)
    problem.add(sums[1], ds.transpose(-1, -2) @ problem.rows_of(problem.q, block), block)


def _weights(problem: Problem, block: Block, result: Result) -> tuple[Block, Tensor, Tensor | None, Tensor]:
    """The block (of all keys where eager's fill has weight), its weights, what lets gradients through, and d logits / d dot."""
    plan, at = problem.plan, block.place
    if plan.exact_rows and not bool((result.row_sum[at] > 0).all()):  # a sum of NaN too
        block = problem.all_keys(block)
        dot = dots(problem, block)
        z, keep = literal_logits(problem, block, dot, result.row_sum[at][..., None] < 0.0)
        p = (z - result.row_max[at][..., None]).exp_() / result.row_sum[at].abs()[..., None]
        return block, p, None if plan.site.additive else keep, problem.slope(block, dot)
    lse = result.lse[at][..., None]
    if not plan.exact_rows:
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    dot = dots(problem, block)
    p = (masked_logits(problem, block, dot) - lse).exp_()
    # of scores in the hundreds the LSE has lost digits, alike for all of a row
    total = p.sum(-1, keepdim=True)
    p = p.div_(total.masked_fill_(total == 0.0, 1.0))
    return block, p, None, problem.slope(block, dot)


def _new_sum(gradient: BiasGradient, problem: Problem) -> Tensor:
    if gradient.kind in ("left", "window"):
        return problem.q.new_zeros(problem.loads[gradient.slot].shape, dtype=problem.dtype)
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
    if gradient.kind in ("row", "left", "window") or not block.width:
        return
    b = slice(0, 1) if gradient.batch_broadcast else slice(block.batches.start, block.batches.stop)
    h = slice(0, 1) if gradient.head_broadcast else slice(block.heads.start, block.heads.stop)
    whole = _over(gradient, dz)
    for columns, keys in block.pieces():
        part, at = whole[..., columns], slice(keys.start, keys.stop)
        if gradient.kind == "tile":
            total[b, h, block.rows.start : block.rows.stop, at] += part
        elif gradient.kind == "column":
            total[b, h, at] += part.sum(-2)
        else:
            first = block.rows[0] - keys[-1] + problem.keys - 1
            sums = diagonal_sums(part)
            total[b, h, first : first + sums.shape[-1]] += sums


def diagonal_sums(t: Tensor) -> Tensor:
    """(..., R, C) -> (..., R + C - 1): sums over equal r - c, ascending.

    Rows padded by R and read with one column less: row r moves r to the right.
    """
    r, c = t.shape[-2:]
    padded = torch.nn.functional.pad(t.flip(-1), (0, r))
    return padded.flatten(-2)[..., : r * (c + r - 1)].reshape(*t.shape[:-2], r, c + r - 1).sum(-2)
