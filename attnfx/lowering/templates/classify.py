"""Which tiles of the score matrix a mask keeps: ends of profiles by tile, and compact lists of the tiles to visit.

A list belongs to one tile of OWN rows (or keys) and names the tiles of WALKED keys (or rows) that it has to meet:
(tiles kept in part, tiles kept entirely, ...places), the partial ones from the front, the full ones from the back, both ascending.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "length", "tiles"])
def profile_ends(
    low, high, loads, ints, heads, length, tiles, VALUE: tl.constexpr, FLOAT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """low, high (batch, heads, tiles), int64 or fp32: the ends of VALUE over TILE rows or keys; a NaN is both.
    Grid (batch * heads * groups of TILES tiles,)."""
    groups = tl.cdiv(tiles, TILES)
    bh = tl.program_id(0) // groups
    b = bh // heads
    h = bh % heads
    tile = tl.program_id(0) % groups * TILES + tl.arange(0, TILES)
    # behind the end the last element again, which changes neither end
    at = tl.minimum(tile[:, None] * TILE + tl.arange(0, TILE)[None, :], length - 1)
    there = tile < tiles
    out = bh.to(tl.int64) * tiles + tile
    value = VALUE(b, h, at, at, loads, ints)
    if FLOAT:
        value = tl.zeros([TILES, TILE], tl.float32) + value
        nan = tl.max((value != value).to(tl.int32), 1) > 0
        tl.store(low + out, tl.where(nan, float("nan"), tl.min(value, 1)), mask=there)
        tl.store(high + out, tl.where(nan, float("nan"), tl.max(value, 1)), mask=there)
    else:
        value = tl.zeros([TILES, TILE], tl.int64) + value.to(tl.int64)
        tl.store(low + out, tl.min(value, 1), mask=there)
        tl.store(high + out, tl.max(value, 1), mask=there)


@triton.jit(do_not_specialize=["heads", "M", "N", "own_tiles", "walked_tiles"])
def tile_lists(
    lists,
    ends,
    ints,
    heads,
    M,
    N,
    own_tiles,
    walked_tiles,
    CLASSIFY: tl.constexpr,
    BY_KEYS: tl.constexpr,
    OWN: tl.constexpr,
    WALKED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """lists (batch, heads, own_tiles, 2 + walked_tiles) int32; `ends`: pairs of (batch, heads, tiles). BY_KEYS: a list belongs to
    a tile of keys. A tile that reaches over the edge is never full. Grid (own_tiles * batch * heads,)."""
    own = tl.program_id(0) % own_tiles
    bh = tl.program_id(0) // own_tiles
    b = bh // heads
    h = bh % heads
    row = lists + tl.program_id(0).to(tl.int64) * (walked_tiles + 2)
    own_first = own * OWN
    partial = own * 0
    full = own * 0
    for start in tl.range(0, walked_tiles, VECTOR):
        tile = start + tl.arange(0, VECTOR)
        there = tile < walked_tiles
        walked = tl.minimum(tile, walked_tiles - 1)
        first = walked * WALKED
        walked_at = bh.to(tl.int64) * walked_tiles + walked
        # a vector like the others, so that no value of the classifier is a scalar
        own_at = bh.to(tl.int64) * own_tiles + own + walked * 0
        if BY_KEYS:
            whole = first + WALKED <= M
            last = tl.minimum(first + WALKED, M) - 1
            own_last = tl.minimum(own_first + OWN, N) - 1
            must, may = CLASSIFY(b, h, first, last, own_first, own_last, walked_at, own_at, walked_at * own_tiles + own, ends, ints)
        else:
            whole = first + WALKED <= N
            last = tl.minimum(first + WALKED, N) - 1
            own_last = tl.minimum(own_first + OWN, M) - 1
            must, may = CLASSIFY(
                b, h, own_first, own_last, first, last, own_at, walked_at, own_at * walked_tiles + walked, ends, ints
            )
        is_full = there & whole & must
        is_partial = (there & (may | must)) & (is_full == 0)
        places = tl.cumsum(is_partial.to(tl.int32), 0)
        tl.store(row + 1 + partial + places, tile, mask=is_partial)
        partial += tl.sum(is_partial.to(tl.int32), 0)
        places = tl.cumsum(is_full.to(tl.int32), 0)
        tl.store(row + 2 + walked_tiles - full - places, tile, mask=is_full)
        full += tl.sum(is_full.to(tl.int32), 0)
    tl.store(row, partial)
    tl.store(row + 1, full)
