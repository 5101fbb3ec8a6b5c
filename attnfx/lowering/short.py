"""Host side of the kernels for few queries and few keys (`templates/short.py`): whom they serve, their blocks, their launches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from attnfx.lowering.codegen import SHORT
from attnfx.lowering.configs import Config, padded
from attnfx.lowering.decode import multiprocessors
from attnfx.lowering.launch import run
from attnfx.lowering.templates.short import short_forward
from attnfx.lowering.templates.short_gradient import short_backward

if TYPE_CHECKING:
    from attnfx.lowering.call import Call, Program, Residuals
    from attnfx.lowering.gradients import BiasGradient

#: The widest head, in bytes of one row.
WIDEST = 128
#: Programs for each multiprocessor: runs of examples are cut so that about as many are left.
PROGRAMS = 16
#: Examples of a run at most.
MEMBERS = 32


def serves(queries: int, keys: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether all of an example is one tile, with heads narrow enough for registers."""
    wide = padded(max(head_dim, value_dim)) * dtype.itemsize
    return 1 <= queries <= SHORT and 1 <= keys <= SHORT and wide <= WIDEST


def config(queries: int, keys: int, dtype: torch.dtype, backward: bool = False) -> Config:
    """Blocks of the sizes, with as many warps as they have work for."""
    block_m, block_n = padded(queries), padded(keys)
    heavy = backward or dtype == torch.float32
    work = block_m * block_n // (256 if heavy else 512)
    return Config(block_m, block_n, max(1, min(8 if heavy else 4, work)), 2 if heavy else 3, tma=False)


def members(batch: int, heads: int, device: torch.device) -> int:
    """How many examples a program walks."""
    return max(1, min(MEMBERS, batch * heads // (PROGRAMS * multiprocessors(device))))


def forward(call: Call, program: Program, q: Tensor, k: Tensor, v: Tensor, out: Tensor, residuals: Residuals) -> None:
    """Fills `out` and `residuals` of a checked `call`, as `flash_forward` would."""
    each, r = members(call.batch, call.heads, q.device), residuals
    grid = (call.heads * -(-call.batch // each),)
    passes = (False, True) if program.exact_rows and (program.fill > -math.inf or program.coarse is not None) else (False,)
    with call.device:
        for literal in passes:
            run(
                short_forward, grid, q, k, v, out, r.lse, r.row_max, r.row_sum, r.degenerate, call.seed, q.stride(), k.stride(),
                v.stride(), out.stride(), *call.scalars, call.batch, each, FLOOR=program.floor, CEILING=program.ceiling,
                EMPTY_ZERO=program.empty_zero, LITERAL=literal, **call.even, **call.switches,
            )  # fmt: skip


def backward(
    call: Call,
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inside: bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v of a checked `call` with as many key as query heads; and the gradient (H,M,N) fp32, summed over the
    examples, of the dots (`inside`) or of the logits, None where `inside` is. Deterministic: no atomics."""
    each, r = members(call.batch, call.heads, q.device), residuals
    runs = -(-call.batch // each)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    bias = None if inside is None else q.new_empty((runs, call.heads, call.m, call.n), dtype=torch.float32)
    loads, ints, heads, _, m, n, dropout_p = call.scalars
    with call.device:
        for literal in (False, True) if program.exact_rows else (False,):
            run(
                short_backward, (call.heads * runs,), q, k, v, out, grad_out, *grads, q if bias is None else bias,
                q if grad_lse is None else grad_lse.float().contiguous(), (r.lse, r.row_max, r.row_sum, r.degenerate), call.seed,
                q.stride(), k.stride(), v.stride(), out.stride(), grad_out.stride(), *(g.stride() for g in grads), loads, ints,
                heads, m, n, dropout_p, call.batch, each, HAS_GRAD_LSE=grad_lse is not None,
                BIAS=None if inside is None else "dots" if inside else "logits", SCORE_GRAD=program.score_grad, LITERAL=literal,
                **call.even, **call.switches,
            )  # fmt: skip
    return *grads, None if bias is None else bias.sum(0)


def bias_sums(g: BiasGradient, tile: Tensor) -> Tensor:
    """What `flash.bias_gradient` gives for `g`, which all examples share, from the gradient (H,M,N) summed over them."""
    m, n = tile.shape[1:]
    if g.head_broadcast:
        tile = tile.sum(0, keepdim=True)
    if g.kind == "column":
        tile = tile.sum(1)
    elif g.kind == "diagonal":
        # rows of M + N numbers read as rows of M + N - 1: each row moves one place further
        skewed = functional.pad(tile.flip(2), (0, m)).flatten(1)[:, : m * (m + n - 1)]
        tile = skewed.view(-1, m, m + n - 1).sum(1)
    return tile[None]
