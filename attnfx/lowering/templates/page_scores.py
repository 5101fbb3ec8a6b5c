"""Scores of pages of a key-value cache: one pass over the keys, which are read as they lie."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.tiles import head_base, load_tile, row_pointers


@triton.jit(do_not_specialize=["heads", "N", "pages"])
def page_scores(
    k,
    by,
    scores,
    k_strides,
    heads,
    N,
    pages,
    PAGE: tl.constexpr,
    PADDED: tl.constexpr,
    PAGES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scores (B,HK,pages) fp32 = means of by . k over pages of PAGE keys, `by` (B,HK,D) fp32, contiguous; the last page may have
    fewer. PAGES pages a program, each in PADDED rows of a tile; grid (runs of PAGES pages * B * HK,)."""
    runs = tl.cdiv(pages, PAGES)
    bh = tl.program_id(0) // runs
    first = tl.program_id(0) % runs * PAGES
    rows = tl.arange(0, PAGES * PADDED)
    within = rows % PADDED
    place = (first + rows // PADDED) * PAGE + within
    there = (within < PAGE) & (place < N)
    offs_d = tl.arange(0, BLOCK_D)
    d_ok = offs_d < D
    # key_tile [PAGES * PADDED, BLOCK_D]
    pointers = row_pointers(head_base(k, k_strides, bh // heads, bh % heads), k_strides, place, offs_d)
    key_tile = load_tile(pointers, there[:, None], d_ok[None, :], True, D != BLOCK_D)
    by_row = tl.load(by + bh.to(tl.int64) * D + offs_d, mask=d_ok, other=0.0)
    dots = tl.sum(key_tile.to(tl.float32) * by_row[None, :], 1)
    sums = tl.sum(tl.reshape(tl.where(there, dots, 0.0), (PAGES, PADDED)), 1)
    page = first + tl.arange(0, PAGES)
    count = tl.minimum(N - page * PAGE, PAGE)
    tl.store(scores + bh.to(tl.int64) * pages + page, sums / count.to(tl.float32), mask=page < pages)
