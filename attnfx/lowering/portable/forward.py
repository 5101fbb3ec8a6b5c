"""Blockwise forward: each block of query rows meets all its keys at once, so that its softmax is the textbook's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable import bands
from attnfx.lowering.portable.aten import Fused
from attnfx.lowering.portable.blocks import Block, Problem
from attnfx.sites.skipping import left_out


class Result(NamedTuple):
    """O (B,H,M,DV) laid out (B,M,H,DV); natural LSE (B,H,M); row maxima and sums (B,H,M) and a flag (B,H) int32, all of numel 0
    unless the plan has exact rows. A negative sum marks a row that was computed over all keys, as eager does it."""

    out: Tensor
    lse: Tensor
    row_max: Tensor
    row_sum: Tensor
    degenerate: Tensor


@dataclass(frozen=True)
class Weights:
    """Unnormalised weights of a block, their row maxima and sums (B',H',R,1); ``literal``: the rows whose weights are eager's
    own, over all keys, None where there are none."""

    block: Block
    p: Tensor
    row_max: Tensor
    row_sum: Tensor
    literal: Tensor | None


def forward(
    plan: KernelPlan, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], seed: Tensor | None
) -> Result:
    """q (B,H,M,D), k (B,HK,N,D), v (B,HK,N,DV), any strides; ``loads`` are the caller's side tensors and then the plan's tables."""
    problem = Problem(plan, q, k, v, loads, tuple(sizes), seed)
    result = new_result(plan, q, k, v)
    if problem.empty:
        result.out.zero_()
        result.lse.fill_(-math.inf)
        return result
    fused = Fused.of(problem)
    for block in parts(problem, fused, lambda whole: fused is not None and _fused(fused, whole, result)):
        _store(result, problem, block_weights(problem, block))
    return result


def parts(problem: Problem, fused: Fused | None, done: Callable[[Block], bool]) -> Iterator[Block]:
    """The blocks that are left to be worked on: those of the calls of torch's CPU kernel that are not ``done`` by it."""
    if fused is None:
        yield from problem.blocks(range(problem.rows))
        return
    for rows in fused.rows():
        for whole in fused.blocks(rows):
            if not done(whole):
                yield from problem.blocks(whole.rows, whole.batches, whole.heads)


def _fused(fused: Fused, block: Block, result: Result) -> bool:
    """A block through torch's CPU kernel; False where it means something else by it."""
    same, mask = fused.mask(block)
    if not same:
        return False
    out, lse = fused.forward(block, mask)
    result.out[block.place], result.lse[block.place] = out, lse
    if fused.problem.plan.exact_rows:
        # exp(z - LSE) / 1: the same weights
        result.row_max[block.place], result.row_sum[block.place] = lse, 1.0
    return True


def new_result(plan: KernelPlan, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Uninitialised outputs; also the rule for fake tensors."""
    batch, heads, rows = q.shape[:3]
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((batch, rows, heads, v.shape[3]), dtype=v.dtype).transpose(1, 2)
    lse = q.new_empty((batch, heads, rows), dtype=working)
    if not plan.exact_rows:
        none = q.new_empty(0, dtype=working)
        return Result(out, lse, none, torch.empty_like(none), q.new_empty(0, dtype=torch.int32))
    return Result(out, lse, torch.empty_like(lse), torch.empty_like(lse), q.new_zeros((batch, heads), dtype=torch.int32))


def block_weights(problem: Problem, block: Block) -> Weights:
    """exp(z - row maximum) of a block; over all keys, in eager's terms, where a row of it meets the fill."""
    plan = problem.plan
    z = _left(problem, block, masked_logits(problem, block, dots(problem, block)))
    row_max = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -math.inf)
    literal = (row_max <= plan.floor) | (row_max >= -plan.hidden) if plan.exact_rows else None
    if literal is not None and not bool(literal.any()):
        literal = None
    if literal is not None and (plan.masked or plan.site.literal is not None):
        block = problem.all_keys(block)
        product = dots(problem, block)
        others = None if plan.site.skip is None else _left(problem, block, masked_logits(problem, block, product))
        z = literal_logits(problem, block, product, literal)[0]
        z = z if others is None else torch.where(literal, z, others)
        row_max = z.amax(-1, keepdim=True)
    if plan.empty_zero or not plan.exact_rows:
        row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    p = (z - row_max).exp_()
    return Weights(block, p, row_max, p.sum(-1, keepdim=True), literal)


def dots(problem: Problem, block: Block) -> Tensor:
    """q . k of a block, (B',H',R,C), with the band where there is one."""
    found = problem.unstacked(problem.rows_of(problem.q, block) @ problem.keys_of(problem.k, block).transpose(-1, -2))
    band = bands.product(problem, block)
    return found if band is None else found + band


def masked_logits(problem: Problem, block: Block, dot: Tensor) -> Tensor:
    """Logits with -inf where the mask does not keep."""
    z = problem.logits(block, dot)
    keep = problem.keep(block)
    return z if keep is None else z.masked_fill(~keep, -math.inf)


def _left(problem: Problem, block: Block, z: Tensor) -> Tensor:
    """z (B',H',R,C) with -inf in the tiles that the site leaves out."""
    skip = problem.plan.site.skip
    if skip is None or not z.shape[-1]:
        return z
    return z.masked_fill(left_out(skip, z, problem.keys, problem.group, block.keys.start), -math.inf)


def literal_logits(problem: Problem, block: Block, dot: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits as the model fills them, in some ``rows`` (B',H',R,1) as it rounds them too, and the mask."""
    z, keep, site = problem.logits(block, dot), problem.keep(block), problem.plan.site
    if keep is not None and site.additive:
        # the model's own sum: at finfo.min the score is lost to rounding
        z = z + torch.where(keep, z.new_zeros(()), z.new_full((), site.fill))
    elif keep is not None:
        z = z.masked_fill(~keep, site.fill)
    if site.literal is not None and (problem.oracle is None or site.dtype == torch.float64):
        z = torch.where(rows, problem.rounded(site.literal, block, dot).to(problem.dtype), z)
    return z, keep


def _store(result: Result, problem: Problem, w: Weights) -> None:
    block, exact = w.block, problem.plan.exact_rows
    literal_zero = exact and not problem.plan.empty_zero  # a sum of 0 means NaN
    survived, scale = w.p, problem.factor(w.block)
    if scale is not None:
        survived = survived * scale
    total = problem.unstacked(problem.stacked(survived) @ problem.keys_of(problem.v, block))
    row_sum = w.row_sum if literal_zero else w.row_sum.masked_fill(w.row_sum == 0.0, 1.0)
    at = block.place
    result.out[at] = (total / row_sum).to(result.out.dtype)
    lse = (w.row_max + w.row_sum.log()).masked_fill(w.row_max == -math.inf, -math.inf)
    result.lse[at] = (lse if literal_zero else lse.masked_fill(w.row_sum == 0.0, -math.inf))[..., 0]
    if exact:
        result.row_max[at] = w.row_max[..., 0]
        # a sum that is NaN would lose its sign; the weights of such a row are NaN by its maximum
        marked = -w.row_sum.nan_to_num(nan=1.0).masked_fill(w.row_sum == 0.0, 1.0)
        result.row_sum[at] = (w.row_sum if w.literal is None else torch.where(w.literal, marked, w.row_sum))[..., 0]
        if w.literal is not None:
            result.degenerate[at[:2]] = 1
