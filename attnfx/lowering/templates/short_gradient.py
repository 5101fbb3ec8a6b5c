"""Gradients of attention with few queries and few keys, many times over: all of them in one kernel, that of a bias which all
examples share as a sum in registers."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.delta import in_base_2
from attnfx.lowering.templates.gradient import logit_gradient, row_statistics, softmax_weights
from attnfx.lowering.templates.tiles import head_base, load_tile, probability_factor, row_pointers, within


@triton.jit(do_not_specialize=["heads", "M", "N", "batches", "members"])
def short_backward(
    q,
    k,
    v,
    o,
    grad_o,
    grad_q,
    grad_k,
    grad_v,
    grad_bias,
    grad_lse,
    stats,
    seed,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    grad_o_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    loads,
    ints,
    heads,
    M,
    N,
    dropout_p,
    batches,
    members,
    HAS_GRAD_LSE: tl.constexpr,
    BIAS: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    LITERAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q, grad_k and grad_v of as many query as key heads; `stats` = (lse, row_max, row_sum, degenerate).

    BIAS "logits" or "dots": grad_bias (runs,H,M,N) fp32, the sums over each run of examples of the gradients of the logits, or of
    the dots. A second launch, LITERAL, is for the examples with degenerate rows. Grid (heads * runs of `members` examples,).
    """
    h = tl.program_id(0) % heads
    run = tl.program_id(0) // heads
    first = run * members
    end = tl.minimum(first + members, batches)
    degenerate = stats[3]
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)
    place = (tl.cast(run, tl.int64) * heads + h) * M * N + offs_m[:, None] * N + offs_n[None, :]
    within_tile = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(first, end, num_stages=STAGES):
        skip = False
        if EXACT_ROWS:
            skip = tl.load(degenerate + b * heads + h) != 0
        if LITERAL:
            if skip:
                found = _example_gradient(
                    q, k, v, o, grad_o, grad_q, grad_k, grad_v, grad_lse, stats, q_strides, k_strides, v_strides, o_strides,
                    grad_o_strides, grad_q_strides, grad_k_strides, grad_v_strides, loads, ints, b, h, heads, M, N, noise,
                    HAS_GRAD_LSE, BIAS, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, EXACT_ROWS, True, DROPOUT, D, DV,
                    EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
                )  # fmt: skip
                if BIAS is not None:
                    before = tl.load(grad_bias + place, mask=within_tile, other=0.0)
                    tl.store(grad_bias + place, before + found, mask=within_tile)
        else:
            found = _example_gradient(
                q, k, v, o, grad_o, grad_q, grad_k, grad_v, grad_lse, stats, q_strides, k_strides, v_strides, o_strides,
                grad_o_strides, grad_q_strides, grad_k_strides, grad_v_strides, loads, ints, b, h, heads, M, N, noise,
                HAS_GRAD_LSE, BIAS, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, EXACT_ROWS, False, DROPOUT, D, DV,
                EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
            if BIAS is not None:
                bias += tl.where(skip, 0.0, found) if EXACT_ROWS else found
    if BIAS is not None and not LITERAL:
        tl.store(grad_bias + place, bias, mask=within_tile)


@triton.jit
def _example_gradient(
    q,
    k,
    v,
    o,
    grad_o,
    grad_q,
    grad_k,
    grad_v,
    grad_lse,
    stats,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    grad_o_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    loads,
    ints,
    b,
    h,
    heads,
    M,
    N,
    noise,
    HAS_GRAD_LSE: tl.constexpr,
    BIAS: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    LITERAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients of one head of one example; the gradient [BLOCK_M, BLOCK_N] of the dots for BIAS "dots", else of the
    logits."""
    bh = b * heads + h
    lse, row_max, row_sum, degenerate = stats
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i = within(offs_m, M, EVEN_M)[:, None]
    j = within(offs_n, N, EVEN_N)[None, :]
    row_ok = (offs_m < M)[:, None]
    inside = (offs_n < N)[None, :]
    key_ok = (offs_n < N)[:, None]
    d_ok = (offs_d < D)[None, :]
    dv_ok = (offs_dv < DV)[None, :]
    # q_tile [BLOCK_M, BLOCK_D], k_tile [BLOCK_N, BLOCK_D], v_tile [BLOCK_N, BLOCK_DV]; dot, weights, dz [BLOCK_M, BLOCK_N]
    queries = row_pointers(head_base(q, q_strides, b, h), q_strides, offs_m, offs_d)
    q_tile = load_tile(queries, row_ok, d_ok, not EVEN_M, D != BLOCK_D)
    keys = row_pointers(head_base(k, k_strides, b, h), k_strides, offs_n, offs_d)
    k_tile = load_tile(keys, key_ok, d_ok, not EVEN_N, D != BLOCK_D)
    values = row_pointers(head_base(v, v_strides, b, h), v_strides, offs_n, offs_dv)
    v_tile = load_tile(values, key_ok, dv_ok, not EVEN_N, DV != BLOCK_DV)
    grads = row_pointers(head_base(grad_o, grad_o_strides, b, h), grad_o_strides, offs_m, offs_dv)
    grad_tile = load_tile(grads, row_ok, dv_ok, not EVEN_M, DV != BLOCK_DV)
    outs = row_pointers(head_base(o, o_strides, b, h), o_strides, offs_m, offs_dv)
    o_tile = load_tile(outs, row_ok, dv_ok, not EVEN_M, DV != BLOCK_DV)
    delta = tl.sum(o_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + tl.cast(bh, tl.int64) * M + offs_m, mask=offs_m < M, other=0.0)
    lses, _, maxima, sums = row_statistics((lse, lse, row_max, row_sum, degenerate), bh, offs_m, M, LITERAL, True)
    statistics = (in_base_2(lses)[:, None], delta[:, None], maxima[:, None], sums[:, None])
    dot = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    weights, live = softmax_weights(
        dot, statistics, i, j, inside, (b, h, bh), loads, ints, SCORE, KEEP, FILL, ADDITIVE, COARSE, LITERAL, True,
    )  # fmt: skip
    factor = probability_factor(i, j, (b, h, bh), noise, loads, ints, WEIGHT, DROPOUT)
    dv = tl.dot(tl.trans((weights * factor).to(grad_tile.dtype)), grad_tile, input_precision=PRECISION)
    dweights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION) * factor
    dz = logit_gradient(weights, live, dweights, delta[:, None], EXACT_ROWS, True)
    ds = dz * SCORE_GRAD(dot, b, h, i, j, loads, ints)
    narrow = ds.to(k_tile.dtype)
    dq = tl.dot(narrow, k_tile, input_precision=PRECISION)
    dk = tl.dot(tl.trans(narrow), q_tile, input_precision=PRECISION)
    q_out = row_pointers(head_base(grad_q, grad_q_strides, b, h), grad_q_strides, offs_m, offs_d)
    tl.store(q_out, dq.to(grad_q.dtype.element_ty), mask=row_ok & d_ok)
    k_out = row_pointers(head_base(grad_k, grad_k_strides, b, h), grad_k_strides, offs_n, offs_d)
    tl.store(k_out, dk.to(grad_k.dtype.element_ty), mask=key_ok & d_ok)
    v_out = row_pointers(head_base(grad_v, grad_v_strides, b, h), grad_v_strides, offs_n, offs_dv)
    tl.store(v_out, dv.to(grad_v.dtype.element_ty), mask=key_ok & dv_ok)
    return ds if BIAS == "dots" else dz
