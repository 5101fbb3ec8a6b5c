"""Attention of few queries and few keys, many times over (windows of an image, short sequences): all keys are one tile, and a
program walks the batch of one head, so that what no example changes, such as a bias of windows, is read once."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import LOG2E
from attnfx.lowering.templates.tiles import (
    LN2,
    column_pointers,
    head_base,
    load_tile,
    probability_factor,
    row_pointers,
    within,
)


@triton.jit(do_not_specialize=["heads", "group", "M", "N", "batches", "members"])
def short_forward(
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
    batches,
    members,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    FLOOR: tl.constexpr,
    CEILING: tl.constexpr,
    EMPTY_ZERO: tl.constexpr,
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
    """What `flash_forward` gives, for M <= BLOCK_M and N <= BLOCK_N; grid (heads * runs of `members` examples,).

    In eager a row that keeps nothing may have weight where nothing is kept, and is rounded as eager rounds: a second launch,
    LITERAL, writes the examples with such rows again, in natural units. Together both would need twice the registers.
    """
    h = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * members
    end = tl.minimum(first + members, batches)
    noise = (0, dropout_p)
    if DROPOUT:
        noise = (tl.load(seed), dropout_p)
    results = (lse, row_max, row_sum, degenerate)
    for b in tl.range(first, end, num_stages=STAGES):
        if LITERAL:
            if tl.load(degenerate + b * heads + h) != 0:
                _example(
                    q, k, v, o, results, q_strides, k_strides, v_strides, o_strides, loads, ints, b, h, heads, group, M, N, noise,
                    SCORE, KEEP, WEIGHT, FILL, FLOOR, CEILING, EMPTY_ZERO, ADDITIVE, COARSE, EXACT_ROWS, True, DROPOUT, D, DV,
                    EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
                )  # fmt: skip
        else:
            _example(
                q, k, v, o, results, q_strides, k_strides, v_strides, o_strides, loads, ints, b, h, heads, group, M, N, noise,
                SCORE, KEEP, WEIGHT, FILL, FLOOR, CEILING, EMPTY_ZERO, ADDITIVE, COARSE, EXACT_ROWS, False, DROPOUT, D, DV,
                EVEN_M, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip


@triton.jit
def _example(
    q,
    k,
    v,
    o,
    results,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    loads,
    ints,
    b,
    h,
    heads,
    group,
    M,
    N,
    noise,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    FILL: tl.constexpr,
    FLOOR: tl.constexpr,
    CEILING: tl.constexpr,
    EMPTY_ZERO: tl.constexpr,
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
    """Writes the results of one head of one example."""
    bh = b * heads + h
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i = within(offs_m, M, EVEN_M)[:, None]
    j = within(offs_n, N, EVEN_N)[None, :]
    row_ok = (offs_m < M)[:, None]
    inside = (offs_n < N)[None, :]
    d_ok = offs_d < D
    dv_ok = (offs_dv < DV)[None, :]
    stat_ok = offs_m < M
    # q_tile [BLOCK_M, BLOCK_D], k_tile [BLOCK_D, BLOCK_N], v_tile [BLOCK_N, BLOCK_DV]; dot, z, p [BLOCK_M, BLOCK_N]
    queries = row_pointers(head_base(q, q_strides, b, h), q_strides, offs_m, offs_d)
    q_tile = load_tile(queries, row_ok, d_ok[None, :], not EVEN_M, D != BLOCK_D)
    keys = column_pointers(head_base(k, k_strides, b, h // group), k_strides, offs_n, offs_d)
    k_tile = load_tile(keys, inside, d_ok[:, None], not EVEN_N, D != BLOCK_D)
    values = row_pointers(head_base(v, v_strides, b, h // group), v_strides, offs_n, offs_dv)
    v_tile = load_tile(values, (offs_n < N)[:, None], dv_ok, not EVEN_N, DV != BLOCK_DV)
    dot = tl.dot(q_tile, k_tile, input_precision=PRECISION)
    z = SCORE(dot, b, h, i, j, loads, ints)
    kept = inside
    if KEEP is not None:
        kept = KEEP(b, h, i, j, loads, ints) & inside
    masked = z
    if KEEP is not None or not EVEN_N:
        masked = tl.where(kept, z, float("-inf"))
    m = tl.max(masked, 1)
    natural_max = m * LN2
    low = stat_ok
    if EXACT_ROWS:
        low = ((m <= FLOOR) | (m >= CEILING)) & stat_ok
    if LITERAL:
        z = z * LN2
        if KEEP is not None:
            z = z + tl.where(kept, 0.0, FILL) if ADDITIVE else tl.where(kept, z, FILL)
        if COARSE is not None:
            z = tl.where(low[:, None], COARSE(dot, b, h, i, j, loads, ints), z)
        z = tl.where(inside, z, float("-inf"))
        natural_max = tl.max(z, 1)
        p = tl.exp2((z - tl.where(natural_max == float("-inf"), 0.0, natural_max)[:, None]) * LOG2E)
    else:
        p = tl.exp2(masked - tl.where(m == float("-inf"), 0.0, m)[:, None])
    l = tl.sum(p, 1)
    p = p * probability_factor(i, j, (b, h, bh), noise, loads, ints, WEIGHT, DROPOUT)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    lse, row_max, row_sum, degenerate = results
    stat = tl.cast(bh, tl.int64) * M + offs_m
    if EXACT_ROWS:
        if EMPTY_ZERO:
            natural_max = tl.where(natural_max == float("-inf"), 0.0, natural_max)
        tl.store(row_max + stat, natural_max, mask=stat_ok)
        # an empty -inf row sums to 0, whose sign would be lost
        marked = tl.where(low, -tl.where(l == 0.0, 1.0, l), l)
        tl.store(row_sum + stat, marked, mask=stat_ok)
        if not LITERAL:
            # one number by all of its rows: Triton 3.7 cannot place a reduction of them for Blackwell
            tl.store(degenerate + bh + offs_m * 0, 1, mask=low)
        acc = acc / (tl.where(l == 0.0, 1.0, l) if EMPTY_ZERO else l)[:, None]
    else:
        acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(lse + stat, natural_max + tl.log2(l) * LN2, mask=stat_ok)
    out = row_pointers(head_base(o, o_strides, b, h), o_strides, offs_m, offs_dv)
    tl.store(out, acc.to(o.dtype.element_ty), mask=row_ok & dv_ok)
