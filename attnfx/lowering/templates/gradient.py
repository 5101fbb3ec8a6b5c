"""What the gradient kernels share: per-row statistics, and one tile of weights and logit gradients from raw dots."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.tiles import LN2, LOG2E, walks


@triton.jit
def row_statistics(stats, bh, offs_row, M, EXACT_ROWS: tl.constexpr, MASKED: tl.constexpr):
    """(lse2, delta, row_max, row_sum) [ROWS] of head `bh`, of `stats` = (lse2, delta, row_max, row_sum, degenerate) as
    `flash_delta` and the forward kernel left them; row_sum is negative in degenerate rows.

    Rows from M on get an infinite LSE and maximum: all their weights are 0, and no mask of rows is needed later.
    """
    lse, delta, row_max, row_sum, _ = stats
    # the head's offset is a 64-bit scalar and the rows' are 32-bit: half the registers of 64-bit offsets
    at = tl.cast(bh, tl.int64) * M
    ok = offs_row < M
    lses = load_row(lse + at + offs_row, ok, float("inf"), MASKED)
    deltas = load_row(delta + at + offs_row, ok, 0.0, MASKED)
    maxima, sums = lses, lses
    if EXACT_ROWS:
        maxima = load_row(row_max + at + offs_row, ok, float("inf"), MASKED)
        sums = load_row(row_sum + at + offs_row, ok, 1.0, MASKED)
    return lses, deltas, maxima, sums


@triton.jit
def walked_statistics(
    rows, stats, bh, start, offs_row, M, EXACT_ROWS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`row_statistics` of rows `start` and on in a loop over them. With `rows`, a descriptor of (lse2, delta) (2,B*H,M) in tiles of
    ROWS that end where M does, the copy engine reads both: as pointers each thread reads all of its rows itself."""
    if rows is None:
        found = row_statistics(stats, bh, offs_row, M, EXACT_ROWS, MASKED)
    else:
        first = tl.cast(start, tl.int32)
        lse2 = tl.reshape(rows.load([0, bh, first]), (ROWS,))
        delta = tl.reshape(rows.load([1, bh, first]), (ROWS,))
        maxima, sums = lse2, lse2
        if EXACT_ROWS:
            at = tl.cast(bh, tl.int64) * M
            maxima, sums = tl.load(stats[2] + at + offs_row), tl.load(stats[3] + at + offs_row)
        found = lse2, delta, maxima, sums
    return found


@triton.jit
def load_row(pointers, ok, other, MASKED: tl.constexpr):
    """A vector, with `other` where not ok."""
    return tl.load(pointers, mask=ok, other=other) if MASKED else tl.load(pointers)


@triton.jit
def gradient_walks(
    first,
    last,
    limit,
    ints,
    blocks,
    b,
    h,
    literal,
    RANGE: tl.constexpr,
    KEEP: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTS: tl.constexpr,
):
    """`walks`, but all of [0, limit) masked where the scalar `literal` is set: there every key has a weight."""
    full, masked = walks(first, last, limit, ints, blocks, b, h, RANGE, KEEP, BLOCK, LISTS)
    if EXACT_ROWS:
        split = masked[2]
        if not LISTS:
            split = tl.where(literal, 0, split)
        gap = tl.where(literal, 0, masked[3])
        masked = (tl.where(literal, 0, masked[0]), tl.where(literal, limit, masked[1]), split, gap)
        full = (tl.where(literal, 0, full[0]), tl.where(literal, 0, full[1]), full[2], full[3])
    return full, masked


@triton.jit
def softmax_weights(
    dot,
    statistics,
    i,
    j,
    inside,
    at,
    loads,
    ints,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    FILL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    COARSE: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(weights, live) of one tile of raw dots, in whichever orientation i and j have; `live`: the logit has a gradient.

    `statistics` are broadcast along the keys; `inside` says which keys exist, None if no other key is read. Where eager
    adds its fill the gradient passes through it; where it replaces, positions that are not kept are not live.
    """
    b, h, _ = at
    lse2, row_max, row_sum = statistics[0], statistics[2], statistics[3]
    z = SCORE(dot, b, h, i, j, loads, ints)
    live = True
    if inside is not None:
        live = inside
    if not MASKED:
        weights = tl.exp2(z - lse2)
    elif EXACT_ROWS:
        z = z * LN2
        if KEEP is not None:
            keep = KEEP(b, h, i, j, loads, ints)
            if ADDITIVE:
                z = z + tl.where(keep, 0.0, FILL)
            else:
                z = tl.where(keep, z, FILL)
                live = both(keep, inside)
        if COARSE is not None:
            z = tl.where(row_sum < 0.0, COARSE(dot, b, h, i, j, loads, ints), z)
        weights = tl.exp2((z - row_max) * LOG2E) / tl.abs(row_sum)
        if inside is not None:
            weights = tl.where(inside, weights, 0.0)
    else:
        if KEEP is not None:
            live = both(KEEP(b, h, i, j, loads, ints), inside)
        weights = tl.where(live, tl.exp2(z - lse2), 0.0)
    return weights, live


@triton.jit
def both(keep, inside):
    """keep & inside, where `inside` may be None."""
    if inside is not None:
        keep = keep & inside
    return keep


@triton.jit
def logit_gradient(weights, live, dweights, delta, EXACT_ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Gradient of the natural logits from that of the weights; exactly 0 where not live, in rows of NaN too."""
    dz = weights * (dweights - delta)
    if MASKED and EXACT_ROWS:
        dz = tl.where(live, dz, 0.0)
    return dz
