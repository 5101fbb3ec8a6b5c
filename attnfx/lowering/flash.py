"""Host side of the flash kernels: checks shapes, allocates, picks blocks, launches. Knows nothing of autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attnfx.lowering import box_streams, decode, short, skips
from attnfx.lowering.band_launch import launched
from attnfx.lowering.bands import Arguments as Band
from attnfx.lowering.call import Call, Program, Residuals
from attnfx.lowering.configs import Config, Kernel, padded, target_of
from attnfx.lowering.launch import recorded_target, run
from attnfx.lowering.templates.bias_gradient import flash_bias_gradient
from attnfx.lowering.templates.delta import flash_delta
from attnfx.lowering.templates.flash_backward import flash_key_gradient, flash_query_gradient
from attnfx.lowering.templates.flash_forward import flash_forward
from attnfx.sites.ordering import Order


def forward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Config | None = None,
    blocks: Tensor | None = None,
    band: Band | None = None,
) -> tuple[Tensor, Residuals]:
    """O (B,H,M,DV) in v's dtype, laid out (B,M,H,DV), and the residuals, from q (B,H,M,D), k (B,HK,N,D), v (B,HK,N,DV).

    Any strides; H a multiple of HK; head dimensions 1 to 256; one dtype of fp16, bf16, fp32. `seed` is an int64 tensor
    of one element, needed where dropout_p > 0; `blocks` lists the tiles that the mask keeps, by rows (`blocks.py`); `band` is
    added to the dots (`bands.py`). Raises ValueError for what the kernels do not carry.
    """
    skip = program.skip
    if skip is not None:
        config = skips.config(skip, q.dtype, q.shape[3], v.shape[3], recorded_target() or target_of(q.device))
    brief = config is None and blocks is None and band is None and is_short(q, k, v)
    chosen = short.config(q.shape[2], k.shape[2], q.dtype) if brief else config
    launch = Call.of("forward", program, q, k, v, loads, ints, dropout_p, seed, chosen, False, blocks, band is not None)
    out = q.new_empty((launch.batch, launch.m, launch.heads, launch.dv), dtype=v.dtype).transpose(1, 2)
    residuals = launch.new_residuals()
    if launch.empty:
        out.fill_(math.nan if program.exact_rows and not program.empty_zero else 0.0)
        residuals.lse.fill_(-math.inf)
        residuals.row_max.fill_(-math.inf)
        residuals.row_sum.fill_(-1.0)
        residuals.degenerate.fill_(1)
        return out, residuals
    if brief:
        short.forward(launch, program, q, k, v, out, residuals)
        return out, residuals
    few = config is None and program.weight is None and band is None and decode.serves(launch.m, launch.n)
    if few or (skip is not None and skip.chunk is not None):
        decode.launch(launch, program, q, k, v, out, residuals)
        return out, residuals
    r = residuals
    queries, keys, values, *_, tma = launch.streamed(q, k, v) if program.order is None else boxes(program.order, launch, q, k, v)
    with launch.device:
        run(
            flash_forward, launch.row_grid, queries, keys, values, out, r.lse, r.row_max, r.row_sum, r.degenerate, launch.seed,
            q.stride(), k.stride(), v.stride(), out.stride(), *launch.scalars, launch.lists, *launched(band),
            skips.limit(skip, launch.n), KV_RANGE=program.kv_range,
            FLOOR=program.floor, CEILING=program.ceiling, EMPTY_ZERO=program.empty_zero,
            TMA=tma, LISTS=blocks is not None, SLOPE=program.factor, PLACE=program.place,
            CORNER=program.corner if tma else None, **launch.even, **launch.switches,
        )  # fmt: skip
    return out, residuals


def boxes(order: Order, launch: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """(q, k, v, whether by descriptors) of tokens in an order: the tensors, or descriptors of their tiles where those are boxes."""
    target = recorded_target() or target_of(q.device)
    found = box_streams.described(target, launch.config, order, (q, k, v))
    return (q, k, v, False) if found is None else (*found, True)


def backward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    grad_lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    query_config: Config | None = None,
    key_config: Config | None = None,
    row_blocks: Tensor | None = None,
    key_blocks: Tensor | None = None,
    band: Band | None = None,
    grad_left: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous and in their dtypes, from forward's results and dO (B,H,M,DV), any strides.

    `grad_lse` (B,H,M) is the gradient of the natural LSE, None for zero; `row_blocks`, `key_blocks` list the tiles that the mask
    keeps, by rows and by keys. `grad_left`, contiguous, takes the gradient of the rows of a `band` that are not the queries.
    Deterministic: no atomics.
    """
    second = band is not None
    rows = Call.of("query_gradient", program, q, k, v, loads, ints, dropout_p, seed, query_config, False, row_blocks, second)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if rows.empty:
        for grad in (*grads, *([] if grad_left is None else [grad_left])):
            grad.zero_()
        return grads
    keys = Call.of("key_gradient", program, q, k, v, loads, ints, dropout_p, seed, key_config, False, key_blocks, second)
    grad_q, grad_k, grad_v = grads
    # products in float32 hide the multiplication, and have no registers left for scaled sums
    slope = None if q.dtype == torch.float32 else program.slope
    *by_rows, rows_tma = rows.streamed(q, k, v, grad_out)
    *by_keys, keys_tma = keys.streamed(q, k, v, grad_out)
    with rows.device:
        numbers, stats = statistics(rows, out, residuals, grad_out, grad_lse)
        run(
            flash_query_gradient, rows.row_grid, *by_rows, grad_q, stats, rows.seed, q.stride(),
            k.stride(), v.stride(), grad_out.stride(), grad_q.stride(), *rows.scalars, rows.lists,
            *launched(band), grad_left, SCORE_GRAD=program.score_grad, KV_RANGE=program.kv_range, TMA=rows_tma,
            LISTS=row_blocks is not None, SLOPE=slope, **rows.even, **rows.switches,
        )  # fmt: skip
        run(
            flash_key_gradient, keys.key_grid, *by_keys, grad_k, grad_v, stats, keys.walked(numbers, keys_tma), keys.seed,
            q.stride(), k.stride(), v.stride(), grad_out.stride(), grad_k.stride(), grad_v.stride(), *keys.scalars, keys.lists,
            *launched(band), SCORE_GRAD=program.score_grad, Q_RANGE=program.q_range, TMA=keys_tma,
            LISTS=key_blocks is not None, SLOPE=slope, **keys.even, **keys.switches,
        )  # fmt: skip
    return grads


def is_short(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels for few queries and keys serve (B,H,M,D), (B,HK,N,D), (B,HK,N,DV)."""
    return q.dim() == v.dim() == 4 and short.serves(q.shape[2], v.shape[2], q.shape[3], v.shape[3], q.dtype)


def backward_short(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    inside: bool | None = None,
    grad_lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`backward` where `is_short` says so, of as many key as query heads; and the gradient (H,M,N), fp32 and summed over the batch,
    of what is added to the natural logits, or to the raw dots if `inside`; None: nothing is."""
    config = short.config(q.shape[2], k.shape[2], q.dtype, backward=True)
    launch = Call.of("query_gradient", program, q, k, v, loads, ints, dropout_p, seed, config)
    if launch.empty:
        bias = None if inside is None else q.new_zeros((launch.heads, launch.m, launch.n), dtype=torch.float32)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), bias
    return short.backward(launch, program, q, k, v, out, residuals, grad_out, grad_lse, inside)


BiasKind = Literal["tile", "column", "diagonal"]
BIAS_KINDS: tuple[BiasKind, ...] = ("tile", "column", "diagonal")


def bias_gradient(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    kind: BiasKind,
    batch_broadcast: bool,
    head_broadcast: bool,
    inside: bool = False,
    grad_lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Config | None = None,
    blocks: Tensor | None = None,
    band: Band | None = None,
) -> Tensor:
    """Gradient, fp32, of a side tensor that is added with weight 1 to the natural logits, or to the raw dots if `inside`;
    BB is 1 or B, BH is 1 or H; `blocks` lists the tiles that the mask keeps, by rows.

    tile      (BB,BH,M,N), indexed [b, h, i, j]
    column    (BB,BH,N), indexed [b, h, j]
    diagonal  (BB,BH,M+N-1), indexed [b, h, i - j + N - 1]; BLOCK_M must equal BLOCK_N
    Deterministic: no atomics.
    """
    kernel: dict[str, Kernel] = {"tile": "tile_bias", "column": "column_bias", "diagonal": "diagonal_bias"}
    square, second = kind == "diagonal", band is not None
    launch = Call.of(kernel[kind], program, q, k, v, loads, ints, dropout_p, seed, config, square, blocks, second)
    m, n, block = launch.m, launch.n, launch.config.block_n
    row_tiles, key_tiles = -(-m // launch.config.block_m), -(-n // block)
    owners = 1 if batch_broadcast else launch.batch, 1 if head_broadcast else launch.heads
    shape, slots = {
        "tile": ((*owners, m, n), row_tiles * key_tiles),
        "column": ((*owners, n), key_tiles),
        "diagonal": ((2, *owners, (row_tiles + key_tiles) * block), row_tiles + key_tiles - 1),
    }[kind]
    if launch.empty:
        return q.new_zeros(shape if kind != "diagonal" else (*owners, max(m + n - 1, 0)), dtype=torch.float32)
    # the two halves of the diagonal sums each leave one end unwritten
    grad = (q.new_zeros if kind == "diagonal" else q.new_empty)(shape, dtype=torch.float32)
    *tiles, tma = launch.streamed(q, k, v, grad_out)
    with launch.device:
        _, stats = statistics(launch, out, residuals, grad_out, grad_lse)
        run(
            flash_bias_gradient, (slots * owners[0] * owners[1],), *tiles, grad, stats, launch.seed,
            q.stride(), k.stride(), v.stride(), grad_out.stride(), *launch.scalars, launch.lists, launch.batch,
            *launched(band),
            KV_RANGE=program.kv_range, KIND=kind, BATCH_BROADCAST=batch_broadcast, HEAD_BROADCAST=head_broadcast,
            SCORE_GRAD=program.score_grad if inside else None, LISTS=blocks is not None, TMA=tma, **launch.even, **launch.switches,
        )  # fmt: skip
    if kind == "diagonal":
        first = key_tiles * block - (n - 1)
        return (grad[0] + grad[1])[..., first : first + m + n - 1]
    return grad


def statistics(
    launch: Call, out: Tensor, residuals: Residuals, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """lse2 and delta (2,B,H,M) fp32, computed here (`flash_delta`), and (lse2, delta, row_max, row_sum, degenerate); the GPU is
    current."""
    numbers = residuals.lse.new_empty((2, *residuals.lse.shape))
    lse2, delta = numbers.unbind()
    block_m = max(16, 2048 // padded(launch.dv))
    run(
        flash_delta, (-(-launch.m // block_m) * launch.batch * launch.heads,), out, grad_out,
        delta if grad_lse is None else grad_lse.float().contiguous(), residuals.lse, delta, lse2, out.stride(), grad_out.stride(),
        launch.heads, launch.m, HAS_GRAD_LSE=grad_lse is not None, DV=launch.dv, BLOCK_M=block_m,
        BLOCK_DV=padded(launch.dv),
    )  # fmt: skip
    r = residuals
    return numbers, (lse2, delta, r.row_max, r.row_sum, r.degenerate)
