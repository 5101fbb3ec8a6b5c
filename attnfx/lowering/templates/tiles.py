"""What every flash kernel shares: addresses, loads, the order of tiles, key ranges, and the dropout mask."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import known_size

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# rows (or keys) that share a list of tiles, and keys (or rows) of a tile in it
OWN = tl.constexpr(64)
WALKED = tl.constexpr(64)


@triton.jit
def head_base(base, strides, b, h):
    """Pointer to element (b, h, 0, 0) of a 4-D tensor; int64, since B * H * M * D passes 2**31 in ordinary models."""
    return base + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def row_pointers(base, strides, offs_row, offs_dim):
    """Pointers [ROWS, DIM] into one head."""
    return base + offs_row.to(tl.int64)[:, None] * strides[2] + offs_dim.to(tl.int64)[None, :] * strides[3]


@triton.jit
def column_pointers(base, strides, offs_row, offs_dim):
    """Pointers [DIM, ROWS] into one head: the same elements, transposed by address and not by moving data."""
    return base + offs_dim.to(tl.int64)[:, None] * strides[3] + offs_row.to(tl.int64)[None, :] * strides[2]


@triton.jit
def load_tile(pointers, row_ok, dim_ok, MASK_ROWS: tl.constexpr, MASK_DIM: tl.constexpr):
    """A tile with zeros outside; no mask at all where both switches are off, which keeps the loads wide."""
    if MASK_ROWS and MASK_DIM:
        tile = tl.load(pointers, mask=row_ok & dim_ok, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=row_ok, other=0.0)
    else:
        tile = tl.load(pointers, mask=dim_ok, other=0.0) if MASK_DIM else tl.load(pointers)
    return tile


@triton.jit
def placed(number, PLACE: tl.constexpr):
    """Where a token lies. In a tile places are sums of the first token's and those of the numbers from 0 (`ordered.py`)."""
    return number if PLACE is None else PLACE(number)


@triton.jit
def within(offsets, limit, EVEN: tl.constexpr):
    """Positions of a tile, those beyond the end as the last one; EVEN: there are none, and addresses stay sums of constants."""
    return offsets if EVEN else tl.minimum(offsets, limit - 1)


@triton.jit
def clamp(value, limit):
    """`value` as int32 within [0, limit]; ranges may come in any integer type, negative or beyond the end."""
    return tl.maximum(tl.minimum(value, limit), 0).to(tl.int32)


@triton.jit
def visited_range(
    first, last, limit, ints, RANGE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, ASCENDING: tl.constexpr = False
):  # fmt: skip
    """(lo, full_lo, full_hi, hi) on the BLOCK grid: visit [lo, full_lo) and [full_hi, hi) masked, the rest unmasked; ASCENDING: as
    `walks` says.

    `hi` alone may be off the grid: the last tile reaches over it.
    """
    if KEEP is None:
        # everything is kept: only the tile that reaches over the edge needs a mask
        lo, full_lo, full_hi, hi = 0, 0, limit // BLOCK * BLOCK, limit
    elif RANGE is None:
        lo, full_lo, full_hi, hi = 0, 0, 0, limit
    else:
        first_kept, first_full, last_full, last_kept = RANGE(first, last, ints)
        lo = clamp(first_kept, limit)
        hi = tl.maximum(clamp(last_kept, limit), lo)
        full_lo = (tl.maximum(clamp(first_full, limit), lo) + BLOCK - 1) // BLOCK * BLOCK
        full_hi = tl.minimum(clamp(last_full, limit), hi) // BLOCK * BLOCK
        lo = lo // BLOCK * BLOCK
        # an empty full range collapses onto lo, so that the second masked loop does all the work
        some = full_hi > full_lo
        if ASCENDING:
            some = some & (full_lo == lo)
        full_lo = tl.where(some, full_lo, lo)
        full_hi = tl.where(some, full_hi, lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def walks(
    first, last, limit, ints, blocks, b, h, RANGE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, LISTS: tl.constexpr,
    ASCENDING: tl.constexpr = False,
):  # fmt: skip
    """The unmasked and the masked tiles of a run of rows or keys, each as (first position, end, split, gap) of `tile_start`:
    by `visited_range`, or those of a list in `blocks` = (lists, strides of batch, head, list); see templates/classify.py.
    ASCENDING: in their own order, the unmasked ones before the masked ones, or none of them taken for unmasked."""
    if LISTS:
        lists, batch_stride, head_stride, stride = blocks
        row = lists + b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride + (first // OWN).to(tl.int64) * stride
        masked = (0, tl.load(row) * WALKED, row + 2, 1)
        full = (0, tl.load(row + 1) * WALKED, row + stride - 1, -1)
    else:
        lo, full_lo, full_hi, hi = visited_range(first, last, limit, ints, RANGE, KEEP, BLOCK, ASCENDING)
        gap = full_hi - full_lo
        masked = (lo, hi - gap, full_lo, gap)
        full = (full_lo, full_hi, 0, 0)
    return full, masked


@triton.jit
def tile_start(position, split, gap, MASKED: tl.constexpr, LISTS: tl.constexpr):
    """Where the tile at a position starts. Masked tiles before the unmasked ones and `gap` behind them are walked in one loop,
    which costs fewer registers than two. Of LISTS `split` points to the first place in a list, and `gap` is the step to the
    next one, 0 for tiles in their own order."""
    start = position
    if LISTS:
        place = position // WALKED
        tile = tl.load(split + place * gap)
        start = tl.where(gap == 0, position, (tile - place) * WALKED + position)
    elif MASKED:
        start = position + tl.where(position >= split, gap, 0)
    known_size(start)
    return start


@triton.jit
def from_the_middle(turn, count):
    """`turn` of `count` numbers from 0, those in the middle first: of diagonals the longest, so that short ones fill the end."""
    half = (turn + 1) // 2
    return count // 2 + tl.where(turn % 2 == 0, half, -half)


@triton.jit
def is_listed(blocks, b, h, first, walked):
    """Whether the list of the tile that holds row (or key) `first` names the tile that holds key (or row) `walked`."""
    lists, batch_stride, head_stride, stride = blocks
    row = lists + b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride + (first // OWN).to(tl.int64) * stride
    tile = walked // WALKED
    return _holds(row + 2, 1, tl.load(row), tile) | _holds(row + stride - 1, -1, tl.load(row + 1), tile)


@triton.jit
def _holds(places, step, count, tile):
    """Whether `count` ascending numbers, `step` apart, have `tile` among them."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        small = tl.load(places + middle * step) < tile
        low = tl.where(small, middle + 1, low)
        high = tl.where(small, high, middle)
    return (low < count) & (tl.load(places + tl.maximum(tl.minimum(low, count - 1), 0) * step) == tile)


@triton.jit
def dropout_scale(i, j, bh, noise):
    """1 / (1 - p) where an element survives, else 0; one Philox counter (j, i, b * H + h) an element, so that every
    kernel, whatever its tiles, sees the same mask."""
    seed, probability = noise
    zero = (i + j) * 0
    random, _, _, _ = tl.philox(seed, zero + j, zero + i, zero + bh, zero)
    return tl.where(tl.uint_to_uniform_float(random) >= probability, 1.0 / (1.0 - probability), 0.0)


@triton.jit
def probability_factor(i, j, at, noise, loads, ints, WEIGHT: tl.constexpr, DROPOUT: tl.constexpr):
    """What multiplies the probabilities after the softmax, a tile: the site's weight, the dropout mask, or the number 1."""
    b, h, bh = at
    factor = 1.0
    if WEIGHT is not None:
        factor = WEIGHT(b, h, i, j, loads, ints)
        if DROPOUT:
            factor = factor * dropout_scale(i, j, bh, noise)
    elif DROPOUT:
        factor = dropout_scale(i, j, bh, noise)
    return factor
