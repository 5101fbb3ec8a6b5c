"""Flash attention forward: one row tile a program, online softmax in base 2, eager's own meaning of degenerate rows."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import known_size
from attnfx.lowering.templates.band import band_products, band_rows, band_scores, turned
from attnfx.lowering.templates.streams import column_stream, column_tile, row_stream, row_tile
from attnfx.lowering.templates.tiles import (
    LN2,
    LOG2E,
    head_base,
    placed,
    probability_factor,
    row_pointers,
    tile_start,
    walks,
    within,
)

HUGE = tl.constexpr(3e38)


@triton.jit(do_not_specialize=["heads", "group", "M", "N"])
def flash_forward(
    q,
    k,
    v,
    o,
    lse,
    row_max,
    row_sum,
    degenerate,
    seed,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
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
    limit,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    KV_RANGE: tl.constexpr,
    FILL: tl.constexpr,
    FLOOR: tl.constexpr,
    CEILING: tl.constexpr,
    EMPTY_ZERO: tl.constexpr,
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
    PLACE: tl.constexpr,
    CORNER: tl.constexpr,
):
    """O (B,H,M,DV) and the natural-log LSE (B,H,M) fp32 of WEIGHT * softmax(SCORE(q k^T)) v; grid (row tiles * B * H,).
    A `band` (templates/band.py) is added to the dots, of square tiles. SLOPE is the positive factor that is all of SCORE, or None.
    With PLACE the rows of q, k, v and o lie at PLACE(row), those of the statistics as they are counted; CORNER: `streams.py`.
    With a `limit` (base 2, negative), tiles whose scores lie that far below what their rows have met are left out: `_visit`.

    FLOOR is the base-2 logit at or below which, CEILING the one at or above which, a row's largest kept score makes the
    row degenerate; with EMPTY_ZERO a row of -inf gives zeros and not NaN. With EXACT_ROWS
    every row also gets its natural maximum and sum; the sum is stored negated in degenerate rows: so the backward kernels
    can tell. There, and only there, COARSE gives the natural logits, fill included, as the model's half precision rounds them.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if KV_RANGE is not None:
        # under a causal mask the last rows see the most keys: start them first, so that no long tile is left alone
        tile = tiles - 1 - tile
    b = bh // heads
    h = bh % heads
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

    # q_tile [BLOCK_M, BLOCK_D]; tiles of keys [BLOCK_D, BLOCK_N], of values [BLOCK_N, BLOCK_DV]
    queries = row_stream(q, q_strides, b, h, placed(tl.arange(0, BLOCK_M), PLACE), offs_d, TMA)
    q_tile = row_tile(queries, begins(i_first, PLACE, CORNER), row_ok, d_ok, True, D != BLOCK_D, BLOCK_M, BLOCK_D, TMA, 0, CORNER)
    keys = column_stream(k, k_strides, b, h // group, placed(offs_n, PLACE), offs_d, TMA)
    values = row_stream(v, v_strides, b, h // group, placed(offs_n, PLACE), offs_dv, TMA)

    second = band_rows(left, window, band, q_tile, b, h, i_first, row_ok, d_ok, M, N, BLOCK_N, BLOCK_D)
    i_last = tl.minimum(i_first + BLOCK_M, M) - 1
    full, masked = walks(i_first, i_last, N, ints, blocks, b, h, KV_RANGE, KEEP, BLOCK_N, LISTS, limit is not None)
    m = first_maxima(offs_m < M, limit, BLOCK_M)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if KEEP is None or KV_RANGE is not None or LISTS:
        acc, l, m = _visit(
            acc, l, m, q_tile, second, keys, values, full[0], full[1], full[2], full[3], i, 0, N, at, noise, loads, ints, SCORE,
            KEEP, WEIGHT, FILL, ADDITIVE, COARSE, False, False, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, PRECISION, TMA,
            LISTS, SLOPE, limit, EVEN_N, True, PLACE, CORNER,
        )  # fmt: skip
    if KEEP is not None or not EVEN_N:
        acc, l, m = _visit(
            acc, l, m, q_tile, second, keys, values, masked[0], masked[1], masked[2], masked[3], i, 0, N, at, noise, loads, ints,
            SCORE, KEEP, WEIGHT, FILL, ADDITIVE, COARSE, True, False, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, PRECISION,
            TMA, LISTS, SLOPE, limit, EVEN_N, True, PLACE, CORNER,
        )  # fmt: skip

    stat = bh.to(tl.int64) * M + offs_m
    stat_ok = offs_m < M
    natural_max = m * LN2
    if EXACT_ROWS:
        low = ((m <= FLOOR) | (m >= CEILING)) & stat_ok
        some_degenerate = tl.max(low.to(tl.int32), 0) > 0
        if float("-inf") < FILL or COARSE is not None:  # noqa: SIM102
            # eager gives such rows weight where nothing is kept: start again, with every key, in natural units
            if some_degenerate:
                all_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
                all_l = tl.zeros([BLOCK_M], tl.float32)
                all_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                all_acc, all_l, all_max = _visit(
                    all_acc, all_l, all_max, q_tile, second, keys, values, 0, N, 0, 0, i, low, N, at, noise, loads, ints, SCORE,
                    KEEP, WEIGHT, FILL, ADDITIVE, COARSE, True, True, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES,
                    PRECISION, TMA, PLACE=PLACE, CORNER=CORNER,
                )  # fmt: skip
                if limit is None:
                    acc, l, natural_max = all_acc, all_l, all_max
                else:  # the other rows keep what they left out
                    acc = tl.where(low[:, None], all_acc, acc)
                    l = tl.where(low, all_l, l)
                    natural_max = tl.where(low, all_max, natural_max)
        if EMPTY_ZERO:
            natural_max = tl.where(natural_max == float("-inf"), 0.0, natural_max)
        tl.store(row_max + stat, natural_max, mask=stat_ok)
        # an empty -inf row sums to 0, whose sign would be lost
        marked = tl.where(low, -tl.where(l == 0.0, 1.0, l), l)
        tl.store(row_sum + stat, marked, mask=stat_ok)
        tl.store(degenerate + bh, 1, mask=some_degenerate)
        acc = acc / (tl.where(l == 0.0, 1.0, l) if EMPTY_ZERO else l)[:, None]
    else:
        acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(lse + stat, natural_max + tl.log2(l) * LN2, mask=stat_ok)
    o_pointers = row_pointers(head_base(o, o_strides, b, h), o_strides, placed(offs_m, PLACE), offs_dv)
    tl.store(o_pointers, acc.to(o.dtype.element_ty), mask=row_ok & dv_ok)


@triton.jit
def begins(start, PLACE: tl.constexpr, CORNER: tl.constexpr):
    """Where a stream is asked for the tile that begins with row `start`: by that row itself where CORNER finds it."""
    return start if CORNER is not None else placed(start, PLACE)


@triton.jit
def first_maxima(there, limit, ROWS: tl.constexpr):
    """Of rows [ROWS] that have met no key: -inf; with a `limit` of those beyond the last row a huge number: they want no tile."""
    nothing = tl.full([ROWS], float("-inf"), tl.float32)
    return nothing if limit is None else tl.where(there, nothing, HUGE)


@triton.jit
def _visit(
    acc,
    l,
    m,
    q_tile,
    second,
    keys,
    values,
    lo,
    hi,
    split,
    gap,
    i,
    low,
    N,
    at,
    noise,
    loads,
    ints,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    MASKED: tl.constexpr,
    LITERAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    LISTS: tl.constexpr = False,
    SLOPE: tl.constexpr = None,
    limit=None,
    EVEN: tl.constexpr = False,
    AHEAD: tl.constexpr = False,
    PLACE: tl.constexpr = None,
    CORNER: tl.constexpr = None,
):
    """Online softmax over key tiles: acc [BLOCK_M, BLOCK_DV], l [BLOCK_M], m [BLOCK_M] (base 2; natural where LITERAL).

    Positions run from lo to hi; `tile_start` says where they lie. `low` [BLOCK_M]: the rows that COARSE is for, where LITERAL.
    EVEN: no tile reaches over the last key. With a `limit` a tile counts only where in some row it reaches the row's largest
    score so far, less that: softmax and second product are left out of the others (BLASST, arXiv:2512.12087), and with AHEAD
    their values are read all the same, so that the pipeline brings those that count in time.
    """
    b, h, _ = at
    offs_n = tl.arange(0, BLOCK_N)
    d_ok = (tl.arange(0, BLOCK_D) < D)[:, None]
    dv_ok = (tl.arange(0, BLOCK_DV) < DV)[None, :]
    # tiles that follow one another share a block of the band
    CARRIED: tl.constexpr = second is not None and not MASKED and not LISTS
    # logits that are the dots times a factor: it goes into the one multiplication and addition of the exponent
    FOLDED: tl.constexpr = SLOPE is not None and not LITERAL
    UNIT: tl.constexpr = SLOPE if FOLDED else 1.0
    OVER: tl.constexpr = MASKED and not EVEN
    if CARRIED:
        lower = band_products(second, lo - BLOCK_N, D, BLOCK_N, BLOCK_D, PRECISION)
    for position in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        start = tile_start(position, split, gap, MASKED, LISTS)
        if LISTS:  # what a mask computes of keys is the same in all tiles but for the start
            tl.assume(start % BLOCK_N == 0)
        offs_j = start + offs_n
        inside = offs_j < N
        # k_tile [BLOCK_D, BLOCK_N], dot and z [BLOCK_M, BLOCK_N]
        lies = begins(start, PLACE, CORNER)
        k_tile = column_tile(keys, lies, inside[None, :], d_ok, OVER, D != BLOCK_D, BLOCK_N, BLOCK_D, TMA, CORNER)
        dot = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        if second is not None:
            if CARRIED:
                upper = band_products(second, start, D, BLOCK_N, BLOCK_D, PRECISION)
                dot += turned(upper, lower, BLOCK_N)
                lower = upper
            else:
                dot += band_scores(second, start, D, BLOCK_N, BLOCK_D, PRECISION)
        j = offs_j[None, :]
        if OVER:
            j = tl.minimum(offs_j, N - 1)[None, :]
        z = dot if FOLDED else SCORE(dot, b, h, i, j, loads, ints)
        if LITERAL:
            z = z * LN2
            if KEEP is not None:
                keep = KEEP(b, h, i, j, loads, ints)
                z = z + tl.where(keep, 0.0, FILL) if ADDITIVE else tl.where(keep, z, FILL)
            if COARSE is not None:
                z = tl.where(low[:, None], COARSE(dot, b, h, i, j, loads, ints), z)
            z = tl.where(inside[None, :], z, float("-inf"))
        elif MASKED:
            if KEEP is None:
                z = tl.where(inside[None, :], z, float("-inf"))
            elif OVER:
                z = tl.where(KEEP(b, h, i, j, loads, ints) & inside[None, :], z, float("-inf"))
            else:
                z = tl.where(KEEP(b, h, i, j, loads, ints), z, float("-inf"))

        if limit is None:
            acc, l, m = _taken(
                acc, l, m, z, values, lies, inside, dv_ok, i, j, at, noise, loads, ints, UNIT, WEIGHT, OVER, LITERAL, DROPOUT,
                DV, BLOCK_N, BLOCK_DV, PRECISION, TMA, CORNER,
            )  # fmt: skip
        else:
            BLOCK_M: tl.constexpr = z.shape[0]
            ahead = None
            if AHEAD:
                ahead = row_tile(values, lies, inside[:, None], dv_ok, OVER, DV != BLOCK_DV, BLOCK_N, BLOCK_DV, TMA, 0, CORNER)
            top = tl.max(z, 1) * UNIT
            # as a NaN compares, a tile that holds one is wanted
            wanted = (top != float("-inf")) & ((top < m + limit) == 0)
            # reordered, though that is nothing to a maximum: Triton's pass over Blackwell's tensor memory stumbles over it else
            if tl.max(tl.reshape(wanted.to(tl.int32), [BLOCK_M], can_reorder=True), 0) > 0:
                acc, l, m = _taken(
                    acc, l, m, z, values, lies, inside, dv_ok, i, j, at, noise, loads, ints, UNIT, WEIGHT, OVER, LITERAL,
                    DROPOUT, DV, BLOCK_N, BLOCK_DV, PRECISION, TMA, CORNER, ahead,
                )  # fmt: skip
    return acc, l, m


@triton.jit
def _taken(
    acc,
    l,
    m,
    z,
    values,
    lies,
    inside,
    dv_ok,
    i,
    j,
    at,
    noise,
    loads,
    ints,
    UNIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    OVER: tl.constexpr,
    LITERAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    CORNER: tl.constexpr,
    ahead=None,
):
    """One tile of scores z [BLOCK_M, BLOCK_N] and its values (or those read `ahead`), added to acc, l, m; UNIT z are the logits."""
    m_new = tl.maximum(m, tl.max(z, 1) * UNIT)
    # a row that has met no key yet: -inf - -inf would be NaN
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    if LITERAL:
        # the difference first: finfo.min * log2(e) would overflow
        p = tl.exp2((z - m_safe[:, None]) * LOG2E)
        alpha = tl.exp2((m - m_safe) * LOG2E)
    else:
        p = tl.exp2(z * UNIT - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    m = m_new
    p = p * probability_factor(i, j, at, noise, loads, ints, WEIGHT, DROPOUT)
    # v_tile [BLOCK_N, BLOCK_DV]
    v_tile = ahead
    if ahead is None:
        v_tile = row_tile(values, lies, inside[:, None], dv_ok, OVER, DV != BLOCK_DV, BLOCK_N, BLOCK_DV, TMA, 0, CORNER)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, l, m
