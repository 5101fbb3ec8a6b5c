"""What the gradient of the logits needs of each row: its delta, from the output and its gradient, and its LSE in base 2."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.tiles import LOG2E, head_base, row_pointers


@triton.jit(do_not_specialize=["heads", "M"])
def flash_delta(
    o,
    grad_o,
    grad_lse,
    lse,
    delta,
    lse2,
    o_strides,
    grad_o_strides,
    heads,
    M,
    HAS_GRAD_LSE: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta (B,H,M) fp32 = sum_d dO * O - dLSE, and lse2 = `in_base_2` of the natural lse, both None where there is none; grid (row
    tiles * B * H,)."""
    tiles = tl.cdiv(M, BLOCK_M)
    bh = tl.program_id(0) // tiles
    offs_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    ok = (offs_m < M)[:, None] & (offs_dv < DV)[None, :]
    # o_tile, grad_tile [BLOCK_M, BLOCK_DV]
    o_base = head_base(o, o_strides, bh // heads, bh % heads)
    o_tile = tl.load(row_pointers(o_base, o_strides, offs_m, offs_dv), mask=ok, other=0.0).to(tl.float32)
    grad_base = head_base(grad_o, grad_o_strides, bh // heads, bh % heads)
    grad_tile = tl.load(row_pointers(grad_base, grad_o_strides, offs_m, offs_dv), mask=ok, other=0.0).to(tl.float32)
    total = tl.sum(o_tile * grad_tile, 1)
    at = bh.to(tl.int64) * M + offs_m
    if HAS_GRAD_LSE:
        total -= tl.load(grad_lse + at, mask=offs_m < M, other=0.0)
    tl.store(delta + at, total, mask=offs_m < M)
    if lse is not None:
        tl.store(lse2 + at, in_base_2(tl.load(lse + at, mask=offs_m < M, other=0.0)), mask=offs_m < M)


@triton.jit
def in_base_2(lse):
    """A natural LSE as gradients take it: of rows without a key 0, as exp2(-inf - 0) is the weight 0 that they need, and
    exp2(-inf - -inf) is not."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
