"""Attention of few queries over many keys: the keys are split over programs, and a second kernel merges their partial softmaxes.

Flash-decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/), with the online softmax of `flash_forward`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.flash_forward import _visit, first_maxima
from attnfx.lowering.templates.streams import column_stream, row_stream
from attnfx.lowering.templates.tiles import LN2, head_base, load_tile, row_pointers, visited_range

NOWHERE = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["heads", "group", "M", "N", "splits", "total"])
def decode_partial(
    q,
    k,
    v,
    partial,
    stats,
    seed,
    q_strides,
    k_strides,
    v_strides,
    loads,
    ints,
    heads,
    group,
    M,
    N,
    dropout_p,
    splits,
    total,
    limit,
    chunk,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    KV_RANGE: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows over one split of the keys that its rows may see; grid (B * HK * row tiles * splits,).

    The rows of a tile are the queries of all the heads that share a key head, head by head: keys and values are read once.
    partial (splits, total, DV) fp32 is the sum of weights times values, not divided, and stats (2, splits, total) fp32 are
    the base-2 maximum and the sum of weights; total = B * H * M rows in the order (b, h, i). Where a maximum is -inf,
    partial is not written. With a `limit`, as of `flash_forward`, a split is `chunk` keys.
    """
    rows = group * M
    tiles = tl.cdiv(rows, BLOCK_M)
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits % tiles
    bk = tl.program_id(0) // (splits * tiles)
    key_heads = heads // group
    b = bk // key_heads
    key_head = bk % key_heads

    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    offs_r = first_row + tl.arange(0, BLOCK_M)
    row = tl.minimum(offs_r, rows - 1)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_r < rows
    d_ok = (offs_d < D)[None, :]
    dv_ok = (offs_dv < DV)[None, :]
    h = (key_head * group + row // M)[:, None]
    i = (row % M)[:, None]
    bh = b * heads + h
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)

    q_pointers = q + b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1] + i.to(tl.int64) * q_strides[2]
    q_tile = load_tile(q_pointers + offs_d.to(tl.int64)[None, :] * q_strides[3], row_ok[:, None], d_ok, True, D != BLOCK_D)
    keys = column_stream(k, k_strides, b, key_head, offs_n, offs_d, False)
    values = row_stream(v, v_strides, b, key_head, offs_n, offs_dv, False)
    at = (b, h, bh)

    # a tile of several heads holds every query, from the first to the last
    one_head = first_row // M == last_row // M
    i_first = tl.where(one_head, first_row % M, 0)
    i_last = tl.where(one_head, last_row % M, M - 1)
    lo, full_lo, full_hi, hi = visited_range(i_first, i_last, N, ints, KV_RANGE, KEEP, BLOCK_N, limit is not None)
    # this program's share, on the BLOCK_N grid but for the very end, and what of it needs no mask
    if limit is None:
        share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), splits) * BLOCK_N
        lo = tl.minimum(lo + split * share, hi)
        hi = tl.minimum(lo + share, hi)
    else:
        lo = tl.minimum(tl.maximum(lo, split * chunk), hi)
        hi = tl.maximum(tl.minimum(hi, (split + 1) * chunk), lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(tl.minimum(full_hi, hi), full_lo)
    gap = full_hi - full_lo
    if KEEP is not None:  # noqa: SIM102
        if gap == 0:
            lo, hi = _kept(lo, hi, b, h, i, N, loads, ints, KEEP, BLOCK_M, BLOCK_N, STAGES)
            full_lo = lo

    m = first_maxima(row_ok, limit, BLOCK_M)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if KEEP is None or KV_RANGE is not None:
        acc, l, m = _visit(
            acc, l, m, q_tile, None, keys, values, full_lo, full_lo + gap, 0, 0, i, 0, N, at, noise, loads, ints, SCORE, KEEP,
            None, FILL, ADDITIVE, COARSE, False, False, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, PRECISION, False,
            False, None, limit,
        )  # fmt: skip
    if KEEP is not None or not EVEN_N:
        acc, l, m = _visit(
            acc, l, m, q_tile, None, keys, values, lo, hi - gap, full_lo, gap, i, 0, N, at, noise, loads, ints, SCORE,
            KEEP, None, FILL, ADDITIVE, COARSE, True, False, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, PRECISION, False,
            False, None, limit,
        )  # fmt: skip

    place = split.to(tl.int64) * total + (b * heads + key_head * group).to(tl.int64) * M + row
    tl.store(stats + place, m, mask=row_ok)
    tl.store(stats + splits.to(tl.int64) * total + place, l, mask=row_ok)
    met = (row_ok & (m > float("-inf")))[:, None]
    tl.store(partial + place[:, None] * DV + offs_dv[None, :], acc, mask=met & dv_ok)


@triton.jit
def _kept(lo, hi, b, h, i, N, loads, ints, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """The part of [lo, hi) between the first and the last tile in which a row keeps a key; empty where none does.

    A mask costs a byte a key, keys and values hundreds: in a cache of fixed length most of them are not to be read yet.
    """
    nearest = tl.full([BLOCK_M, BLOCK_N], NOWHERE, tl.int32)
    farthest = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        offs_j = start + tl.arange(0, BLOCK_N)
        keep = KEEP(b, h, i, tl.minimum(offs_j, N - 1)[None, :], loads, ints) & (offs_j < N)[None, :]
        nearest = tl.minimum(nearest, tl.where(keep, offs_j[None, :], NOWHERE))
        farthest = tl.maximum(farthest, tl.where(keep, offs_j[None, :], -1))
    near = tl.min(tl.min(nearest, 1), 0)
    far = tl.max(tl.max(farthest, 1), 0)
    return tl.where(far < 0, hi, near // BLOCK_N * BLOCK_N), tl.where(far < 0, hi, tl.minimum(far + 1, hi))


@triton.jit(do_not_specialize=["heads", "group", "M", "N", "splits", "total"])
def decode_merge(
    q,
    k,
    v,
    partial,
    stats,
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
    splits,
    total,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O, LSE and, with EXACT_ROWS, the row statistics that `flash_forward` gives, from `decode_partial`; one row a program,
    grid (B * H * M,). A degenerate row is computed again over all keys with eager's literal meaning."""
    place = tl.program_id(0)
    i = place % M
    bh = place // M
    b = bh // heads
    h = bh % heads
    offs_dv = tl.arange(0, BLOCK_DV)
    dv_ok = offs_dv < DV

    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        ok = split < splits
        there = split.to(tl.int64) * total + place
        m_split = tl.load(stats + there, mask=ok, other=float("-inf"))
        l_split = tl.load(stats + splits.to(tl.int64) * total + there, mask=ok, other=0.0)
        met = (m_split > float("-inf"))[:, None]
        part = tl.load(partial + there[:, None] * DV + offs_dv[None, :], mask=met & dv_ok[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(m_split, 0))
        # no key met yet: -inf - -inf would be NaN
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - m_safe)
        weight = tl.exp2(m_split - m_safe)
        l = l * alpha + tl.sum(l_split * weight, 0)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m = m_new

    natural_max = m * LN2
    stat = place + tl.arange(0, 1)
    if EXACT_ROWS:
        is_degenerate = tl.max(((m <= FLOOR) | (m >= CEILING)).to(tl.int32), 0) > 0
        if float("-inf") < FILL or COARSE is not None:  # noqa: SIM102
            if is_degenerate:
                noise = (0, dropout_p)
                if DROPOUT:
                    noise = (tl.load(seed), dropout_p)
                offs_n = tl.arange(0, BLOCK_N)
                offs_d = tl.arange(0, BLOCK_D)
                # tl.dot wants a tile: the same row over and over
                rows = i + tl.arange(0, BLOCK_M) * 0
                q_pointers = row_pointers(head_base(q, q_strides, b, h), q_strides, rows, offs_d)
                q_tile = load_tile(q_pointers, True, (offs_d < D)[None, :], False, D != BLOCK_D)
                keys = column_stream(k, k_strides, b, h // group, offs_n, offs_d, False)
                values = row_stream(v, v_strides, b, h // group, offs_n, offs_dv, False)
                m_rows = tl.full([BLOCK_M], float("-inf"), tl.float32)
                l_rows = tl.zeros([BLOCK_M], tl.float32)
                acc_rows = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                acc_rows, l_rows, m_rows = _visit(
                    acc_rows, l_rows, m_rows, q_tile, None, keys, values, 0, N, 0, 0, rows[:, None], rows == i, N, (b, h, bh),
                    noise, loads, ints, SCORE, KEEP, None, FILL, ADDITIVE, COARSE, True, True, DROPOUT, D, DV, BLOCK_N, BLOCK_D,
                    BLOCK_DV, STAGES, PRECISION, False,
                )  # fmt: skip
                top = tl.arange(0, BLOCK_M) == 0
                natural_max = tl.zeros([1], tl.float32) + tl.sum(tl.where(top, m_rows, 0.0), 0)
                l = tl.zeros([1], tl.float32) + tl.sum(tl.where(top, l_rows, 0.0), 0)
                acc = tl.sum(tl.where(top[:, None], acc_rows, 0.0), 0)
        if EMPTY_ZERO:
            natural_max = tl.where(natural_max == float("-inf"), 0.0, natural_max)
        tl.store(row_max + stat, natural_max)
        # an empty -inf row sums to 0, whose sign would be lost
        tl.store(row_sum + stat, tl.where(is_degenerate, -tl.where(l == 0.0, 1.0, l), l))
        tl.store(degenerate + bh, 1, mask=is_degenerate)
        acc = acc / (tl.where(l == 0.0, 1.0, l) if EMPTY_ZERO else l)
    else:
        acc = acc / tl.where(l == 0.0, 1.0, l)
    tl.store(lse + stat, natural_max + tl.log2(l) * LN2)
    o_row = head_base(o, o_strides, b, h) + i.to(tl.int64) * o_strides[2]
    tl.store(o_row + offs_dv.to(tl.int64) * o_strides[3], acc.to(o.dtype.element_ty), mask=dv_ok)
