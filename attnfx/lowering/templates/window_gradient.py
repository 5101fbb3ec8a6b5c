"""Gradient of a band's window: for each distance the sum of what its scores send back, times the rows that it met."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.band import band_rows, turned_back
from attnfx.lowering.templates.bias_gradient import tile_gradient
from attnfx.lowering.templates.streams import row_stream, row_tile
from attnfx.lowering.templates.tiles import from_the_middle, is_listed


@triton.jit(do_not_specialize=["heads", "group", "M", "N", "batches", "parts"])
def flash_window_gradient(
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
    parts,
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
    """out (2,BB,BH,parts,slots,BLOCK,D) fp32: a program owns the square tiles at one j_tile - i_tile, and one of `parts` of the
    batches and heads that share a window; each element has one owner and one order of sums. A tile meets two blocks of vectors,
    that which begins at its own j - i and the one before: the halves of `out`, which the host adds. Grid: slots * BB * BH * parts.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    key_tiles = tl.cdiv(N, BLOCK_N)
    slots = row_tiles + key_tiles - 1
    slot = from_the_middle(tl.program_id(0) // parts % slots, slots)
    part = tl.program_id(0) % parts
    owner = tl.program_id(0) // slots // parts
    i_tile = tl.maximum(row_tiles - 1 - slot, 0)
    j_tile = tl.maximum(slot - (row_tiles - 1), 0)
    length = tl.minimum(row_tiles - i_tile, key_tiles - j_tile)
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
    share = tl.cdiv(members, parts)
    begin = tl.minimum(part * share, members)
    end = tl.minimum(begin + share, members)
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)

    upper = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lower = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for turn in tl.range(begin * length, end * length, num_stages=STAGES):
        member = turn // length
        move = turn % length
        b = first_b + member // per_batch
        h = first_h + member % per_batch
        i_first = (i_tile + move) * BLOCK_M
        j_first = (j_tile + move) * BLOCK_N
        visit = True
        if KEEP is not None and (KV_RANGE is not None or LISTS):
            if LISTS:
                visit = is_listed(blocks, b, h, i_first, j_first)
            else:
                keys = KV_RANGE(i_first, tl.minimum(i_first + BLOCK_M, M) - 1, ints)
                visit = (keys[0] < j_first + BLOCK_N) & (keys[3] > j_first)
            if EXACT_ROWS:
                # in a head with a degenerate row eager may give any key a weight
                visit = visit | (tl.load(stats[4] + b * heads + h) != 0)
        if visit:
            upper, lower = _add_tile(
                upper, lower, q, k, v, grad_o, stats, q_strides, k_strides, v_strides, grad_o_strides, i_first, j_first, b, h,
                heads, group, M, N, noise, loads, ints, left, window, band, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE,
                EXACT_ROWS, DROPOUT, D, DV, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
            )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)
    place = (owner * parts + part) * slots + slot
    at = tl.cast(place, tl.int64) * BLOCK_N * D + tl.arange(0, BLOCK_N)[:, None] * D + offs_d[None, :]
    half = tl.cast(tl.num_programs(0), tl.int64) * BLOCK_N * D
    tl.store(out + at, lower, mask=(offs_d < D)[None, :])
    tl.store(out + half + at, upper, mask=(offs_d < D)[None, :])


@triton.jit
def _add_tile(
    upper,
    lower,
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
    """The sums [BLOCK_N, BLOCK_D] of both blocks of vectors with what the tile at (i_first, j_first) adds to them."""
    ds = tile_gradient(
        q, k, v, grad_o, stats, q_strides, k_strides, v_strides, grad_o_strides, i_first, j_first, b, h, heads, group, M, N, noise,
        loads, ints, left, window, band, 0, SCORE, SCORE_GRAD, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, EXACT_ROWS, DROPOUT, D, DV,
        EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
    )  # fmt: skip
    b = tl.cast(b, tl.int32)
    h = tl.cast(h, tl.int32)
    offs_m = i_first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    d_ok = (offs_d < D)[None, :]
    row_ok = (offs_m < M)[:, None]
    queries = row_stream(q, q_strides, b, h, tl.arange(0, BLOCK_M), offs_d, TMA)
    q_tile = row_tile(queries, i_first, row_ok, d_ok, not EVEN_M, D != BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    rows = band_rows(left, window, band, q_tile, b, h, i_first, row_ok, d_ok, M, N, BLOCK_N, BLOCK_D)
    above, below = turned_back(rows, ds, BLOCK_N)
    upper = tl.dot(tl.trans(above), rows[0], upper, input_precision=PRECISION)
    lower = tl.dot(tl.trans(below), rows[0], lower, input_precision=PRECISION)
    return upper, lower
