"""Flash attention backward: the gradient of q by row tiles, those of k and v by key tiles; no atomics."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import known_size
from attnfx.lowering.templates.band import band_columns, band_row_gradient, band_rows, band_scores
from attnfx.lowering.templates.gradient import gradient_walks, logit_gradient, row_statistics, softmax_weights, walked_statistics
from attnfx.lowering.templates.streams import column_stream, column_tile, row_stream, row_tile
from attnfx.lowering.templates.tiles import head_base, probability_factor, row_pointers, tile_start, within


@triton.jit(do_not_specialize=["heads", "group", "M", "N"])
def flash_query_gradient(
    q,
    k,
    v,
    grad_o,
    grad_q,
    stats,
    seed,
    q_strides,
    k_strides,
    v_strides,
    grad_o_strides,
    grad_q_strides,
    loads,
    ints,
    heads,
    group,
    M,
    N,
    dropout_p,
    blocks,
    left,
    window,
    band,
    grad_left,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    KV_RANGE: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
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
    TMA: tl.constexpr,
    LISTS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """grad_q (B,H,M,D) = sum_j dz * SCORE_GRAD * k_j; `stats` = (lse2, delta, row_max, row_sum, degenerate); grid (row tiles * B *
    H,). The rows of a `band` have theirs in grad_left, contiguous (B,H,M,D), or, where they are the queries, in grad_q. SLOPE
    is SCORE_GRAD where that is one number, or None: it multiplies the sums."""
    tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if KV_RANGE is not None:
        # the heaviest tiles first, as in the forward kernel
        tile = tiles - 1 - tile
    b, h = bh // heads, bh % heads
    at = (b, h, bh)
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)

    i_first = tile * BLOCK_M
    known_size(i_first)
    offs_m = i_first + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i = within(offs_m, M, EVEN_M)[:, None]
    row_ok = (offs_m < M)[:, None]
    d_ok = (offs_d < D)[None, :]
    dv_ok = (offs_dv < DV)[None, :]

    # q_tile [BLOCK_M, BLOCK_D], grad_tile [BLOCK_M, BLOCK_DV]; key and value pointers [BLOCK_D or BLOCK_DV, BLOCK_N]
    queries = row_stream(q, q_strides, b, h, tl.arange(0, BLOCK_M), offs_d, TMA)
    q_tile = row_tile(queries, i_first, row_ok, d_ok, True, D != BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    grads = row_stream(grad_o, grad_o_strides, b, h, tl.arange(0, BLOCK_M), offs_dv, TMA)
    grad_tile = row_tile(grads, i_first, row_ok, dv_ok, True, DV != BLOCK_DV, BLOCK_M, BLOCK_DV, TMA)
    keys = column_stream(k, k_strides, b, h // group, offs_n, offs_d, TMA)
    values = column_stream(v, v_strides, b, h // group, offs_n, offs_dv, TMA)
    lse2, delta, row_max, row_sum = row_statistics(stats, bh, offs_m, M, EXACT_ROWS, True)
    statistics = (lse2[:, None], delta[:, None], row_max[:, None], row_sum[:, None])

    second = band_rows(left, window, band, q_tile, b, h, i_first, row_ok, d_ok, M, N, BLOCK_N, BLOCK_D)
    # the gradient of a band's rows; where they are the queries, it stays zero and nothing is made of it
    beside = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    i_last = tl.minimum(i_first + BLOCK_M, M) - 1
    literal = False
    if EXACT_ROWS:
        literal = tl.min(row_sum, 0) < 0.0
    full, masked = gradient_walks(
        i_first, i_last, N, ints, blocks, b, h, literal, KV_RANGE, KEEP, EXACT_ROWS, BLOCK_N, LISTS,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if KEEP is None or KV_RANGE is not None or LISTS:
        acc, beside = _visit_keys(
            acc, beside, q_tile, second, grad_tile, keys, values, statistics, full[0], full[1], full[2], full[3], i, N, at, noise,
            loads, ints, grad_left is not None, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, EXACT_ROWS, DROPOUT, False,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, PRECISION, TMA, LISTS, SLOPE,
        )  # fmt: skip
    if KEEP is not None or EXACT_ROWS or not EVEN_N:
        acc, beside = _visit_keys(
            acc, beside, q_tile, second, grad_tile, keys, values, statistics, masked[0], masked[1], masked[2], masked[3], i, N, at,
            noise, loads, ints, grad_left is not None, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, EXACT_ROWS, DROPOUT,
            True, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, PRECISION, TMA, LISTS, SLOPE,
        )  # fmt: skip
    if SLOPE is not None:
        acc, beside = acc * SLOPE, beside * SLOPE
    out = row_pointers(head_base(grad_q, grad_q_strides, b, h), grad_q_strides, offs_m, offs_d)
    tl.store(out, acc.to(grad_q.dtype.element_ty), mask=row_ok & d_ok)
    if grad_left is not None:
        out = row_pointers(head_base(grad_left, grad_q_strides, b, h), grad_q_strides, offs_m, offs_d)
        tl.store(out, beside.to(grad_left.dtype.element_ty), mask=row_ok & d_ok)


@triton.jit
def _visit_keys(
    acc,
    beside,
    q_tile,
    second,
    grad_tile,
    keys,
    values,
    statistics,
    lo,
    hi,
    split,
    gap,
    i,
    N,
    at,
    noise,
    loads,
    ints,
    BESIDE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    LISTS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_D] += dS k over key tiles; positions as in forward. `beside`: a gradient of a band's rows."""
    b, h, _ = at
    offs_n = tl.arange(0, BLOCK_N)
    d_ok = (tl.arange(0, BLOCK_D) < D)[:, None]
    dv_ok = (tl.arange(0, BLOCK_DV) < DV)[:, None]
    for position in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        start = tile_start(position, split, gap, MASKED, LISTS)
        offs_j = start + offs_n
        inside = (offs_j < N)[None, :]
        j = offs_j[None, :]
        if MASKED:
            j = tl.minimum(offs_j, N - 1)[None, :]
        # k_tile [BLOCK_D, BLOCK_N], v_tile [BLOCK_DV, BLOCK_N]; dot, weights, dz [BLOCK_M, BLOCK_N]
        k_tile = column_tile(keys, start, inside, d_ok, MASKED, D != BLOCK_D, BLOCK_N, BLOCK_D, TMA)
        v_tile = column_tile(values, start, inside, dv_ok, MASKED, DV != BLOCK_DV, BLOCK_N, BLOCK_DV, TMA)
        dot = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        if second is not None:
            dot += band_scores(second, start, D, BLOCK_N, BLOCK_D, PRECISION)
        weights, live = softmax_weights(
            dot, statistics, i, j, inside, at, loads, ints, SCORE, KEEP, FILL, ADDITIVE, COARSE, EXACT_ROWS, MASKED,
        )  # fmt: skip
        dweights = tl.dot(grad_tile, v_tile, input_precision=PRECISION)
        dweights = dweights * probability_factor(i, j, at, noise, loads, ints, WEIGHT, DROPOUT)
        dz = logit_gradient(weights, live, dweights, statistics[1], EXACT_ROWS, MASKED)
        ds = dz if SLOPE is not None else dz * SCORE_GRAD(dot, b, h, i, j, loads, ints)
        acc = tl.dot(ds.to(k_tile.dtype), tl.trans(k_tile), acc, input_precision=PRECISION)
        if second is not None:
            if not BESIDE:
                acc = band_row_gradient(acc, second, ds, start, D, BLOCK_N, BLOCK_D, PRECISION)
            else:
                beside = band_row_gradient(beside, second, ds, start, D, BLOCK_N, BLOCK_D, PRECISION)
    return acc, beside


@triton.jit(do_not_specialize=["heads", "group", "M", "N"])
def flash_key_gradient(
    q,
    k,
    v,
    grad_o,
    grad_k,
    grad_v,
    stats,
    rows,
    seed,
    q_strides,
    k_strides,
    v_strides,
    grad_o_strides,
    grad_k_strides,
    grad_v_strides,
    loads,
    ints,
    heads,
    group,
    M,
    N,
    dropout_p,
    blocks,
    left,
    window,
    band,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    Q_RANGE: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
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
    TMA: tl.constexpr,
    LISTS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """grad_k (B,HK,N,D) and grad_v (B,HK,N,DV): one key tile a program, which walks the query heads of its group and their rows, so
    that every sum has one owner and one order; `rows` as in `walked_statistics`; grid (key tiles * B * HK,)."""
    tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % tiles
    key_heads = heads // group
    b, hk = tl.program_id(0) // tiles // key_heads, tl.program_id(0) // tiles % key_heads
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)

    j_first = tile * BLOCK_N
    known_size(j_first)
    offs_n = j_first + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    j = within(offs_n, N, EVEN_N)[:, None]
    key_ok = (offs_n < N)[:, None]
    d_ok = (offs_d < D)[None, :]
    dv_ok = (offs_dv < DV)[None, :]
    # k_tile [BLOCK_N, BLOCK_D], v_tile [BLOCK_N, BLOCK_DV]
    keys = row_stream(k, k_strides, b, hk, tl.arange(0, BLOCK_N), offs_d, TMA)
    k_tile = row_tile(keys, j_first, key_ok, d_ok, True, D != BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    values = row_stream(v, v_strides, b, hk, tl.arange(0, BLOCK_N), offs_dv, TMA)
    v_tile = row_tile(values, j_first, key_ok, dv_ok, True, DV != BLOCK_DV, BLOCK_N, BLOCK_DV, TMA)

    j_last = tl.minimum(j_first + BLOCK_N, N) - 1
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in tl.range(0, group, num_stages=1):
        h = hk * group + member
        bh = b * heads + h
        at = (b, h, bh)
        literal = False
        if EXACT_ROWS:
            literal = tl.load(stats[4] + bh) != 0
        full, masked = gradient_walks(
            j_first, j_last, M, ints, blocks, b, h, literal, Q_RANGE, KEEP, EXACT_ROWS, BLOCK_M, LISTS,
        )  # fmt: skip
        queries = row_stream(q, q_strides, b, h, offs_m, offs_d, TMA)
        grads = row_stream(grad_o, grad_o_strides, b, h, offs_m, offs_dv, TMA)
        if KEEP is None or Q_RANGE is not None or LISTS:
            dk, dv = _visit_rows(
                dk, dv, k_tile, v_tile, queries, left, window, band, grads, stats, rows, j_first, N, full[0], full[1], full[2],
                full[3], j, M, at, noise, loads, ints, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, EXACT_ROWS, DROPOUT,
                False, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, STAGES, PRECISION, TMA, LISTS, SLOPE,
            )  # fmt: skip
        if KEEP is not None or EXACT_ROWS or not EVEN_M:
            dk, dv = _visit_rows(
                dk, dv, k_tile, v_tile, queries, left, window, band, grads, stats, rows, j_first, N, masked[0], masked[1],
                masked[2], masked[3], j, M, at, noise, loads, ints, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE,
                EXACT_ROWS, DROPOUT, True, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, STAGES, PRECISION, TMA, LISTS, SLOPE,
            )  # fmt: skip
    if SLOPE is not None:
        dk = dk * SLOPE
    k_out = row_pointers(head_base(grad_k, grad_k_strides, b, hk), grad_k_strides, offs_n, offs_d)
    tl.store(k_out, dk.to(grad_k.dtype.element_ty), mask=key_ok & d_ok)
    v_out = row_pointers(head_base(grad_v, grad_v_strides, b, hk), grad_v_strides, offs_n, offs_dv)
    tl.store(v_out, dv.to(grad_v.dtype.element_ty), mask=key_ok & dv_ok)


@triton.jit
def _visit_rows(
    dk,
    dv,
    k_tile,
    v_tile,
    queries,
    left,
    window,
    band,
    grads,
    stats,
    rows,
    j_first,
    N,
    lo,
    hi,
    split,
    gap,
    j,
    M,
    at,
    noise,
    loads,
    ints,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    LISTS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """dk += dS^T q, dv += P^T dO over row tiles of one query head; score tiles are [keys, rows]; positions of rows."""
    b, h, bh = at
    offs_m = tl.arange(0, BLOCK_M)
    d_ok = (tl.arange(0, BLOCK_D) < D)[None, :]
    dv_ok = (tl.arange(0, BLOCK_DV) < DV)[None, :]
    for position in tl.range(lo, hi, BLOCK_M, num_stages=STAGES):
        start = tile_start(position, split, gap, MASKED, LISTS)
        offs_i = start + offs_m
        row_ok = offs_i < M
        i = offs_i[None, :]
        if MASKED:
            i = tl.minimum(offs_i, M - 1)[None, :]
        # q_tile [BLOCK_M, BLOCK_D], grad_tile [BLOCK_M, BLOCK_DV]; dot, weights, dz [BLOCK_N, BLOCK_M]
        q_tile = row_tile(queries, start, row_ok[:, None], d_ok, MASKED, D != BLOCK_D, BLOCK_M, BLOCK_D, TMA)
        grad_tile = row_tile(grads, start, row_ok[:, None], dv_ok, MASKED, DV != BLOCK_DV, BLOCK_M, BLOCK_DV, TMA)
        found = walked_statistics(rows, stats, bh, start, offs_i, M, EXACT_ROWS and MASKED, MASKED, BLOCK_M)
        statistics = (found[0][None, :], found[1][None, :], found[2][None, :], found[3][None, :])
        if window is not None:
            second = band_rows(left, window, band, q_tile, b, h, start, row_ok[:, None], d_ok, M, N, BLOCK_M, BLOCK_D)
            beside = band_columns(second, j_first, D, BLOCK_M, BLOCK_D, PRECISION)
            dot = tl.dot(k_tile, tl.trans(q_tile), beside, input_precision=PRECISION)
        else:
            dot = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weights, live = softmax_weights(
            dot, statistics, i, j, None, at, loads, ints, SCORE, KEEP, FILL, ADDITIVE, COARSE, EXACT_ROWS, MASKED,
        )  # fmt: skip
        # dv before dweights: fewer tiles are alive at once
        factor = probability_factor(i, j, at, noise, loads, ints, WEIGHT, DROPOUT)
        dv = tl.dot((weights * factor).to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
        dweights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION) * factor
        dz = logit_gradient(weights, live, dweights, statistics[1], EXACT_ROWS, MASKED)
        ds = dz if SLOPE is not None else dz * SCORE_GRAD(dot, b, h, i, j, loads, ints)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv
