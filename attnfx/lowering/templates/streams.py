"""Tiles that a kernel walks over: by addresses, or by a tensor descriptor, which the copy engine of Hopper and later reads.

A stream is (source, step, b, h): pointers to the first tile of a head and the stride of a row, or a descriptor of the whole
tensor (B, H, rows, dim), whose tiles are zero outside of it. With CORNER the tiles of a descriptor are boxes of five axes.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.tiles import column_pointers, head_base, load_tile, row_pointers


@triton.jit
def row_stream(x, strides, b, h, offs_row, offs_dim, TMA: tl.constexpr):
    """The stream of tiles [ROWS, DIM] of one head."""
    source = x if TMA else row_pointers(head_base(x, strides, b, h), strides, offs_row, offs_dim)
    return source, strides[2], b, h


@triton.jit
def column_stream(x, strides, b, h, offs_row, offs_dim, TMA: tl.constexpr):
    """The stream of tiles [DIM, ROWS] of one head."""
    source = x if TMA else column_pointers(head_base(x, strides, b, h), strides, offs_row, offs_dim)
    return source, strides[2], b, h


@triton.jit
def row_tile(
    stream, start, row_ok, dim_ok, MASK_ROWS: tl.constexpr, MASK_DIM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    TMA: tl.constexpr, first_dim=0, CORNER: tl.constexpr = None,
):  # fmt: skip
    """[ROWS, DIM] from row `start` on, zero outside where switched on; `first_dim`, of a descriptor, pointers have in them."""
    source, step, b, h = stream
    if CORNER is not None:
        tile = box(source, CORNER(b, h, tl.cast(start, tl.int32)), ROWS, DIM)
    elif TMA:
        tile = tl.reshape(source.load([b, h, tl.cast(start, tl.int32), first_dim]), (ROWS, DIM))
    else:
        tile = load_tile(source + tl.cast(start, tl.int64) * step, row_ok, dim_ok, MASK_ROWS, MASK_DIM)
    return tile


@triton.jit
def column_tile(
    stream, start, row_ok, dim_ok, MASK_ROWS: tl.constexpr, MASK_DIM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    TMA: tl.constexpr, CORNER: tl.constexpr = None,
):  # fmt: skip
    """[DIM, ROWS] from row `start` on."""
    source, step, b, h = stream
    if CORNER is not None:
        tile = tl.trans(box(source, CORNER(b, h, tl.cast(start, tl.int32)), ROWS, DIM))
    elif TMA:
        tile = tl.trans(tl.reshape(source.load([b, h, tl.cast(start, tl.int32), 0]), (ROWS, DIM)))
    else:
        tile = load_tile(source + tl.cast(start, tl.int64) * step, row_ok, dim_ok, MASK_ROWS, MASK_DIM)
    return tile


@triton.jit
def box(source, corner, ROWS: tl.constexpr, DIM: tl.constexpr):
    """[ROWS, DIM]: the box of a descriptor that begins at `corner`."""
    return tl.reshape(source.load([corner[0], corner[1], corner[2], corner[3], corner[4]]), (ROWS, DIM))
