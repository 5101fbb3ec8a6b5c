"""Causal linear attention in one pass: a program walks over a segment of the tokens, block by block, and carries the state along.

Output and all three gradients are the form of `templates/linear.py`, X1 X2^T Z within a block and X1 times a state beside it. The
state is what the blocks that were passed make of X2^T Z, so it never leaves the registers: an output walks from the first block to
the last one, the gradients of keys and values from the last one to the first.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import known_size
from attnfx.lowering.templates.linear import LOG2E, product
from attnfx.lowering.templates.streams import column_stream, column_tile, row_stream, row_tile
from attnfx.lowering.templates.tiles import head_base, row_pointers


@triton.jit(do_not_specialize=["heads", "group", "M", "segment", "eps"])
def linear_walk(
    x1,
    x2,
    z,
    out,
    states,
    state_sums,
    scale,
    add,
    sums,
    decay,
    x1_strides,
    x2_strides,
    z_strides,
    out_strides,
    state_strides,
    heads,
    group,
    M,
    segment,
    eps,
    by_scale,
    MODE: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    W: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    DIVISOR: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """`out` (B,H,M,E) for each query head, times `by_scale`; arguments are those of `linear_mix`, and `states` by strides (batch
    and head, segment, W, E) are beside the segments, which are whole blocks. Grid (segments * blocks of E * B * H,)."""
    UPPER: tl.constexpr = MODE == "key" or MODE == "value"
    # of the sums beside a state: of X2 over the features of X1, or of Z over those of the result
    WITH_X2: tl.constexpr = MODE == "output"
    SUMMED: tl.constexpr = NORMALIZE and MODE != "value"
    segments, e_blocks = tl.cdiv(M, segment), tl.cdiv(E, BLOCK_E)
    # the blocks of E of a segment run beside each other: they read the same X1 and X2
    e_block = tl.program_id(0) % e_blocks
    t = tl.program_id(0) // e_blocks % segments
    bh = tl.program_id(0) // (e_blocks * segments)
    b = bh // heads
    h = bh % heads
    key_head = h // group
    offs_w = tl.arange(0, BLOCK_W)
    first_e = e_block * BLOCK_E
    offs_e = first_e + tl.arange(0, BLOCK_E)
    w_ok = offs_w < W
    e_ok = offs_e < E
    offs = tl.arange(0, BLOCK)
    x1_tiles = row_stream(x1, x1_strides, b, key_head if UPPER else h, offs, offs_w, TMA)
    x2_tiles = column_stream(x2, x2_strides, b, h if UPPER else key_head, offs, offs_w, TMA)
    z_tiles = row_stream(z, z_strides, b, h if UPPER else key_head, offs, offs_e, TMA)
    out_base = head_base(out, out_strides, b, h)
    row_base = bh.to(tl.int64) * M
    log = 0.0
    if DECAY:
        log = tl.load(decay + h) * LOG2E

    first = t * segment
    known_size(first)
    end = tl.minimum(first + segment, M)
    state = tl.load(
        states
        + bh.to(tl.int64) * state_strides[0]
        + tl.cast(t, tl.int64) * state_strides[1]
        + offs_w[:, None] * state_strides[2]
        + offs_e[None, :] * state_strides[3],
        mask=w_ok[:, None] & e_ok[None, :],
        other=0.0,
    )
    carried = tl.zeros([BLOCK_W if WITH_X2 else BLOCK_E], tl.float32)
    if SUMMED:
        vector = state_sums + (bh.to(tl.int64) * segments + t) * (W if WITH_X2 else E)
        carried = tl.load(vector + (offs_w if WITH_X2 else offs_e), mask=w_ok if WITH_X2 else e_ok, other=0.0)
    blocks = tl.cdiv(end - first, BLOCK)
    for step in tl.range(0, blocks, num_stages=STAGES):
        start = first + ((blocks - 1 - step) if UPPER else step) * BLOCK
        rows = start + offs
        ok = rows < end
        # x1_tile [BLOCK, BLOCK_W], x2_tile [BLOCK_W, BLOCK], z_tile [BLOCK, BLOCK_E]
        x1_tile = row_tile(x1_tiles, start, ok[:, None], w_ok[None, :], True, W != BLOCK_W, BLOCK, BLOCK_W, TMA)
        x2_tile = column_tile(x2_tiles, start, ok[None, :], w_ok[:, None], True, W != BLOCK_W, BLOCK, BLOCK_W, TMA)
        z_tile = row_tile(z_tiles, start, ok[:, None], e_ok[None, :], True, E % BLOCK_E != 0, BLOCK, BLOCK_E, TMA, first_e)
        weights = product(x1_tile, x2_tile, tl.zeros([BLOCK, BLOCK], tl.float32), HALF, PRECISION)
        acc = product(x1_tile, state, tl.zeros([BLOCK, BLOCK_E], tl.float32), HALF, PRECISION)
        scales = tl.full([BLOCK], 1.0, tl.float32)
        adds = tl.zeros([BLOCK], tl.float32)
        l = tl.zeros([BLOCK], tl.float32)
        if NORMALIZE and MODE != "output":
            # of the queries, which are the rows of a gradient of queries, and the columns of one of keys or values
            scales = tl.load(scale + row_base + rows, mask=ok, other=0.0)
            if MODE != "value":
                adds = tl.load(add + row_base + rows, mask=ok, other=0.0)
        if SUMMED:
            if MODE == "output":
                l = tl.sum(x1_tile * carried[None, :], 1)
            elif MODE == "query":
                weights = weights * scales[:, None] + adds[:, None]
                acc = acc * scales[:, None] + adds[:, None] * carried[None, :]
            else:
                weights = weights * scales[None, :] + adds[None, :]
                acc += carried[None, :]
        elif NORMALIZE:
            weights = weights * scales[None, :]
        # of the block's own rows, so that what decays is made anew and does not stay in registers
        behind = rows[None, :] - rows[:, None] if UPPER else rows[:, None] - rows[None, :]
        if DECAY:
            near = tl.exp2(log * tl.maximum(tl.minimum(BLOCK, end - start) - 1 - offs, 0))
            by = tl.exp2(log * (offs + 1))
            acc = acc * (near if UPPER else by)[:, None]
            l = l * by
            weights = weights * tl.exp2(log * tl.maximum(behind, 0))
        # what stands beyond the end, in X2 or in Z, is zero
        weights = tl.where(behind >= 0, weights, 0.0)
        acc = product(weights, z_tile, acc, HALF, PRECISION)
        if MODE == "output" and NORMALIZE:
            l += tl.sum(weights, 1)
            l = l * by_scale
            below = l + eps
            if DIVISOR == "max":
                below = tl.maximum(l, eps)
            elif DIVISOR == "max_abs":
                below = tl.maximum(tl.abs(l), eps)
            acc = acc / below[:, None]
            if e_block == 0:
                tl.store(sums + row_base + rows, l, mask=ok)
        acc = (acc * by_scale).to(out.dtype.element_ty)
        tl.store(row_pointers(out_base, out_strides, rows, offs_e), acc, mask=ok[:, None] & e_ok[None, :])

        # what this block adds to the state, as the next one sees it
        passed = tl.full([BLOCK], 1.0, tl.float32)
        if DECAY:
            faded = tl.exp2(log * tl.minimum(BLOCK, end - start))
            state = state * faded
            carried = carried * faded
            passed = by if UPPER else near
        if SUMMED:
            if WITH_X2:
                carried += tl.sum(x2_tile * passed[None, :], 1)
            elif MODE == "query":
                carried += tl.sum(z_tile * passed[:, None], 0)
            else:
                carried += tl.sum(z_tile * (passed * adds)[:, None], 0)
        if NORMALIZE and UPPER:
            passed = passed * scales
        if DECAY or (NORMALIZE and UPPER):
            # of the two, Z: X2 as it lies in shared memory is an operand of the product
            z_tile = (z_tile * passed[:, None]).to(z_tile.dtype)
        state = product(x2_tile, z_tile, state, HALF, PRECISION)
