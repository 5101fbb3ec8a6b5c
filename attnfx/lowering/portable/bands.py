"""The band of a block: one product of its rows with a run of the window, read askew; and the gradients of both."""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.lowering.gradients import BiasGradient
from attnfx.lowering.portable.blocks import Block, Problem
from attnfx.sites.band import Band, rounded, skewed


def product(problem: Problem, block: Block) -> Tensor | None:
    """What the band adds to q.k, (B',H',R,C); None without one."""
    band = problem.plan.site.band
    if band is None:
        return None
    left, run = _left(problem, band, block), _run(problem, block)
    return rounded(skewed((left @ run.transpose(-1, -2)).contiguous(), len(block.keys)), band)


def gradients(problem: Problem, block: Block, dots: Tensor, totals: list[Tensor]) -> Tensor | None:
    """The band's part of the gradient of the queries (B',H',R,D), None where it has none. ``dots`` is the gradient of q.k
    (B',H',R,C); what the other operands get is added to ``totals``, the sums of ``plan.gradients``."""
    band = problem.plan.site.band
    if band is None or not len(block.keys):
        return None
    scaled = dots if band.factor == 1.0 else dots * band.factor
    rows, columns = scaled.shape[-2:]
    spread = scaled.new_zeros((*scaled.shape[:-1], rows + columns - 1))
    skewed(spread, columns).copy_(scaled)
    wanted = {g.kind: (g, total) for g, total in zip(problem.plan.gradients, totals, strict=True)}
    if "window" in wanted:
        gradient, total = wanted["window"]
        total[_place(problem, total, block)] += _summed(gradient, spread, _left(problem, band, block))
    if band.left is not None and "left" not in wanted:
        return None
    found = spread @ _run(problem, block)
    if band.left is None:
        return found
    wanted["left"][1][block.place] += found
    return None


def _summed(gradient: BiasGradient, spread: Tensor, left: Tensor) -> Tensor:
    """The products of ``spread`` (B',H',R,T) and ``left`` (B',H',R,W), summed over the rows and over what shares a window."""
    axes = "" if gradient.batch_broadcast else "b"
    axes += "" if gradient.head_broadcast else "h"
    found = torch.einsum(f"bhrt,bhrw->{axes}tw", spread, left)
    for axis, shared in ((0, gradient.batch_broadcast), (1, gradient.head_broadcast)):
        found = found.unsqueeze(axis) if shared else found
    return found


def _left(problem: Problem, band: Band, block: Block) -> Tensor:
    source = problem.q if band.left is None else problem.loads[band.left]
    return source[block.place].to(problem.dtype)


def _run(problem: Problem, block: Block) -> Tensor:
    """The vectors of the distances that a block meets, (1 or B', 1 or H', R + C - 1, W)."""
    source = problem.loads[-1]
    return source[_place(problem, source, block)].to(problem.dtype)


def _place(problem: Problem, source: Tensor, block: Block) -> tuple[slice, slice, slice]:
    whole = slice(None)
    first = block.keys.start - (block.rows.stop - 1) + problem.rows - 1
    return (
        whole if source.shape[0] == 1 else slice(block.batches.start, block.batches.stop),
        whole if source.shape[1] == 1 else slice(block.heads.start, block.heads.stop),
        slice(first, first + max(len(block.rows) + len(block.keys) - 1, 0)),
    )
