"""Gradient of a side tensor that is added to the natural logits: whole tiles, key columns, or relative diagonals."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import known_size
from attnfx.lowering.templates.band import band_rows, band_scores
from attnfx.lowering.templates.gradient import logit_gradient, row_statistics, softmax_weights
from attnfx.lowering.templates.streams import column_stream, column_tile, row_stream, row_tile
from attnfx.lowering.templates.tiles import from_the_middle, is_listed, probability_factor, within


@triton.jit(do_not_specialize=["heads", "group", "M", "N", "batches"])
def flash_bias_gradient(
    q,
    k,
    v,
    grad_o,
    out,
    stats,
    seed,
    q_strides,
    k_strides,
    v_strides,
    grad_o_strides,
    loads,
    ints,
    heads,
    group,
    M,
    N,
    dropout_p,
    blocks,
    batches,
    left,
    window,
    band,
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
    KIND: tl.constexpr,
    BATCH_BROADCAST: tl.constexpr,
    HEAD_BROADCAST: tl.constexpr,
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
    LISTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Sums of dz, or of dz * SCORE_GRAD where it is given, over what the side tensor does not index; fp32, each element with
    one owner and one order of sums.

    KIND "tile": out (BB,BH,M,N), a program owns one tile and sums over the broadcast b and h. "column": out (BB,BH,N),
    it owns BLOCK_N keys and also sums over the rows. "diagonal": out (2,BB,BH,tiles,BLOCK), it owns the band of square
    tiles at one i_tile - j_tile, whose elements at one place of the tile all have the same i - j; a band covers two
    blocks of i - j, of which it writes one to each half of `out`, and the host adds the halves. Heads with a degenerate row, in
    which eager may give any key a weight, are few: they come after all others. Grid: slots * BB * BH.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    key_tiles = tl.cdiv(N, BLOCK_N)
    if KIND == "tile":
        slots = row_tiles * key_tiles
        slot = tl.program_id(0) % slots
        i_tile = slot // key_tiles
        j_tile = slot % key_tiles
        length = 1
    elif KIND == "column":
        slots = key_tiles
        slot = tl.program_id(0) % slots
        i_tile = 0
        j_tile = slot
        length = row_tiles
    else:
        slots = row_tiles + key_tiles - 1
        slot = from_the_middle(tl.program_id(0) % slots, slots)
        i_tile = tl.maximum(slot - (key_tiles - 1), 0)
        j_tile = tl.maximum(key_tiles - 1 - slot, 0)
        length = tl.minimum(row_tiles - i_tile, key_tiles - j_tile)
    owner = tl.program_id(0) // slots
    first_b = owner
    first_h = 0
    members = 1
    if HEAD_BROADCAST:
        members = heads
    else:
        first_b = owner // heads
        first_h = owner % heads
    per_batch = members
    if BATCH_BROADCAST:
        members = members * batches
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    degenerate = 0
    for turn in tl.range(0, members * length, num_stages=STAGES):
        b = first_b + turn // length // per_batch
        h = first_h + turn // length % per_batch
        i_first = (i_tile + turn % length) * BLOCK_M
        j_first = (j_tile + (turn % length if KIND == "diagonal" else 0)) * BLOCK_N
        flag = 0
        if EXACT_ROWS:
            flag = tl.load(stats[4] + b * heads + h)
            degenerate = degenerate | flag
        if KEEP is not None and (KV_RANGE is not None or LISTS):
            if LISTS:
                visit = is_listed(blocks, b, h, i_first, j_first)
            else:
                keys = KV_RANGE(i_first, tl.minimum(i_first + BLOCK_M, M) - 1, ints)
                visit = (keys[0] < j_first + BLOCK_N) & (keys[3] > j_first)
            if visit:
                acc += tile_gradient(
                    q, k, v, grad_o, stats, q_strides, k_strides, v_strides, grad_o_strides, i_first, j_first, b, h, heads, group,
                    M, N, noise, loads, ints, left, window, band, flag, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE,
                    False, DROPOUT, D, DV, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
                )  # fmt: skip
        else:
            acc += tile_gradient(
                q, k, v, grad_o, stats, q_strides, k_strides, v_strides, grad_o_strides, i_first, j_first, b, h, heads, group, M, N,
                noise, loads, ints, left, window, band, flag, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, False,
                DROPOUT, D, DV, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
            )  # fmt: skip
    if EXACT_ROWS:
        for turn in tl.range(0, tl.where(degenerate != 0, members * length, 0), num_stages=1):
            b = first_b + turn // length // per_batch
            h = first_h + turn // length % per_batch
            i_first = (i_tile + turn % length) * BLOCK_M
            j_first = (j_tile + (turn % length if KIND == "diagonal" else 0)) * BLOCK_N
            if tl.load(stats[4] + b * heads + h) != 0:
                acc += tile_gradient(
                    q, k, v, grad_o, stats, q_strides, k_strides, v_strides, grad_o_strides, i_first, j_first, b, h, heads, group,
                    M, N, noise, loads, ints, left, window, band, 0, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, True,
                    DROPOUT, D, DV, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
                )  # fmt: skip

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    wide = tl.cast(owner, tl.int64)
    if KIND == "tile":
        offs_i = i_tile * BLOCK_M + rows
        offs_j = j_tile * BLOCK_N + columns
        at = wide * M * N + offs_i.to(tl.int64)[:, None] * N + offs_j[None, :]
        tl.store(out + at, acc, mask=(offs_i < M)[:, None] & (offs_j < N)[None, :])
    elif KIND == "column":
        offs_j = j_tile * BLOCK_N + columns
        tl.store(out + wide * N + offs_j, tl.sum(acc, 0), mask=offs_j < N)
    else:
        # skewed [row, c]: the element of that row on circular diagonal c, which is i - j = c, or c - BLOCK if row < c
        source = (rows[:, None] - columns[None, :] + BLOCK_N) % BLOCK_N
        skewed = tl.gather(acc, source, 1)
        upper = rows[:, None] < columns[None, :]
        blocks = row_tiles + key_tiles
        half = tl.cast(tl.num_programs(0) // slots, tl.int64) * blocks * BLOCK_N
        at = (wide * blocks + slot) * BLOCK_N + columns
        tl.store(out + at, tl.sum(tl.where(upper, skewed, 0.0), 0))
        tl.store(out + half + at + BLOCK_N, tl.sum(tl.where(upper, 0.0, skewed), 0))


@triton.jit
def tile_gradient(
    q,
    k,
    v,
    grad_o,
    stats,
    q_strides,
    k_strides,
    v_strides,
    grad_o_strides,
    i_first,
    j_first,
    b,
    h,
    heads,
    group,
    M,
    N,
    noise,
    loads,
    ints,
    left,
    window,
    band,
    flag,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """dz [BLOCK_M, BLOCK_N], or dz * SCORE_GRAD where given, of the tile at (i_first, j_first) of head (b, h), zero outside, and
    all zero where `flag` is set."""
    known_size(i_first)
    known_size(j_first)
    bh = b * heads + h
    b = tl.cast(b, tl.int32)
    h = tl.cast(h, tl.int32)
    offs_m = i_first + tl.arange(0, BLOCK_M)
    offs_n = j_first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = (offs_m < M)[:, None]
    key_ok = (offs_n < N)[None, :]
    d_ok = offs_d < D
    dv_ok = offs_dv < DV
    # q_tile [BLOCK_M, BLOCK_D], grad_tile [BLOCK_M, BLOCK_DV], k_tile [BLOCK_D, BLOCK_N], v_tile [BLOCK_DV, BLOCK_N]
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    queries = row_stream(q, q_strides, b, h, rows, offs_d, TMA)
    q_tile = row_tile(queries, i_first, row_ok, d_ok[None, :], not EVEN_M, D != BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    grads = row_stream(grad_o, grad_o_strides, b, h, rows, offs_dv, TMA)
    grad_tile = row_tile(grads, i_first, row_ok, dv_ok[None, :], not EVEN_M, DV != BLOCK_DV, BLOCK_M, BLOCK_DV, TMA)
    keys = column_stream(k, k_strides, b, h // group, columns, offs_d, TMA)
    k_tile = column_tile(keys, j_first, key_ok, d_ok[:, None], not EVEN_N, D != BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    values = column_stream(v, v_strides, b, h // group, columns, offs_dv, TMA)
    v_tile = column_tile(values, j_first, key_ok, dv_ok[:, None], not EVEN_N, DV != BLOCK_DV, BLOCK_N, BLOCK_DV, TMA)
    lse2, delta, row_max, row_sum = row_statistics(stats, bh, offs_m, M, EXACT_ROWS, not EVEN_M)
    statistics = (lse2[:, None], delta[:, None], row_max[:, None], row_sum[:, None])
    dot = tl.dot(q_tile, k_tile, input_precision=PRECISION)
    if window is not None:
        second = band_rows(left, window, band, q_tile, b, h, i_first, row_ok, d_ok[None, :], M, N, BLOCK_N, BLOCK_D)
        dot += band_scores(second, j_first, D, BLOCK_N, BLOCK_D, PRECISION)
    i = within(offs_m, M, EVEN_M)[:, None]
    j = within(offs_n, N, EVEN_N)[None, :]
    inside = None
    if not EVEN_N:
        inside = key_ok
    masked: tl.constexpr = KEEP is not None or EXACT_ROWS or not EVEN_N
    weights, live = softmax_weights(
        dot, statistics, i, j, inside, (b, h, bh), loads, ints, SCORE, KEEP, FILL, ADDITIVE, COARSE, EXACT_ROWS, masked,
    )  # fmt: skip
    dweights = tl.dot(grad_tile, v_tile, input_precision=PRECISION)
    dweights = dweights * probability_factor(i, j, (b, h, bh), noise, loads, ints, WEIGHT, DROPOUT)
    some: tl.constexpr = KEEP is not None or not EVEN_N
    dz = logit_gradient(weights, live, dweights, delta[:, None], some, True)
    if SCORE_GRAD is not None:
        dz = dz * SCORE_GRAD(dot, b, h, i, j, loads, ints)
    return tl.where(flag != 0, 0.0, dz)
