"""Bands in a tile: the product of each row with the vector of each distance, and what its gradient sends back.

Tiles are square, [B, B]. A tile that begins at row i and key j meets the distances j - i - B + 1 to j - i + B - 1, which two blocks
of B vectors hold, the lower from j - i - B and the upper from j - i on. Row r finds column c at place (c - r) mod B: of the upper
block where r <= c, of the lower one else.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.tiles import head_base, load_tile


@triton.jit
def band_rows(left, window, band, q_tile, b, h, i_first, row_ok, d_ok, M, N, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a tile of rows needs: (rows [BLOCK, BLOCK_D], window, its strides, b, h, the place of the first row's own position, how
    many vectors there are, the factor). None without a band.

    `band` = (strides of left, strides of the window, factor), the strides of batch, head and row; without `left` the queries are
    multiplied. An axis of the window that all batches or heads share has the stride 0.
    """
    rows = None
    if window is not None:
        left_strides = band[0]
        tile = q_tile
        if left is not None:
            tile = load_tile(_places(left, left_strides, b, h, i_first, BLOCK, BLOCK_D), row_ok, d_ok, True, True)
        rows = (tile, window, band[1], b, h, M - 1 - i_first, M + N - 1, band[2])
    return rows


@triton.jit
def _places(x, strides, b, h, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to rows of one head from `first` on: a 64-bit scalar and 32-bit offsets, which take half of the
    registers of 64-bit ones."""
    base = head_base(x, strides, b, h) + tl.cast(first, tl.int64) * strides[2]
    return base + (tl.arange(0, BLOCK)[:, None] * strides[2] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def band_block(rows, start, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: the vectors that the first row meets at keys from `start` on, zero where there are none."""
    _, window, strides, b, h, own, count, _ = rows
    places = own + start + tl.arange(0, BLOCK)
    there = ((places >= 0) & (places < count))[:, None]
    d_ok = (tl.arange(0, BLOCK_D) < D)[None, :]
    pointers = _places(window, strides, b, h, own + start, BLOCK, BLOCK_D)
    block = load_tile(pointers, there, d_ok, True, D != BLOCK_D).to(rows[0].dtype)
    return block


@triton.jit
def band_products(rows, start, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK, BLOCK]: the rows times the block from `start` on, as the model rounds it."""
    found = tl.dot(rows[0], tl.trans(band_block(rows, start, D, BLOCK, BLOCK_D)), input_precision=PRECISION)
    return (found * rows[7]).to(rows[0].dtype)


@triton.jit
def band_scores(rows, start, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK, BLOCK] fp32: what the band adds to the dots of keys from `start` on."""
    upper = band_products(rows, start, D, BLOCK, BLOCK_D, PRECISION)
    return turned(upper, band_products(rows, start - BLOCK, D, BLOCK, BLOCK_D, PRECISION), BLOCK)


@triton.jit
def turned(upper, lower, BLOCK: tl.constexpr):
    """Products with both blocks as scores, fp32: row r turned by r."""
    r = tl.arange(0, BLOCK)[:, None]
    x = tl.arange(0, BLOCK)[None, :]
    return tl.gather(tl.where(x < BLOCK - r, upper, lower), (x - r) & (BLOCK - 1), 1).to(tl.float32)


@triton.jit
def band_columns(rows, start, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """`band_scores` transposed, [keys, rows]."""
    tile = tl.trans(rows[0])
    upper = tl.dot(band_block(rows, start, D, BLOCK, BLOCK_D), tile, input_precision=PRECISION)
    upper = (upper * rows[7]).to(tile.dtype)
    lower = tl.dot(band_block(rows, start - BLOCK, D, BLOCK, BLOCK_D), tile, input_precision=PRECISION)
    lower = (lower * rows[7]).to(tile.dtype)
    x = tl.arange(0, BLOCK)[:, None]
    r = tl.arange(0, BLOCK)[None, :]
    return tl.gather(tl.where(x < BLOCK - r, upper, lower), (x - r) & (BLOCK - 1), 0).to(tl.float32)


@triton.jit
def turned_back(rows, ds, BLOCK: tl.constexpr):
    """(upper, lower) [BLOCK, BLOCK]: the gradient of the products with both blocks from that of the dots."""
    r = tl.arange(0, BLOCK)[:, None]
    x = tl.arange(0, BLOCK)[None, :]
    straight = tl.gather((ds * rows[7]).to(rows[0].dtype), (x + r) & (BLOCK - 1), 1)
    above = x < BLOCK - r
    zero = tl.zeros([BLOCK, BLOCK], rows[0].dtype)
    return tl.where(above, straight, zero), tl.where(above, zero, straight)


@triton.jit
def band_row_gradient(acc, rows, ds, start, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BLOCK, BLOCK_D] += the gradient of the rows from that of the dots of keys from `start` on."""
    upper, lower = turned_back(rows, ds, BLOCK)
    acc = tl.dot(upper, band_block(rows, start, D, BLOCK, BLOCK_D), acc, input_precision=PRECISION)
    return tl.dot(lower, band_block(rows, start - BLOCK, D, BLOCK, BLOCK_D), acc, input_precision=PRECISION)
