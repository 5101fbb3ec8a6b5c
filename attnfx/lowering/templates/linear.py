"""Linear attention: states of chunks, their scan, and what a chunk makes of its own scores and the state beside it.

Output and all three gradients have one form, with roles exchanged: X1 [rows, W] times X2 [columns, W] are weights of the chunk,
those times Z [columns, E] and X1 times a state [W, E] are the result.

    output   X1 = Q   X2 = K   Z = V    state before the chunk       columns up to the row
    query    X1 = dO  X2 = V   Z = K    the same, transposed         columns up to the row
    key      X1 = V   X2 = dO  Z = Q    gradient of the state behind the chunk, transposed     columns from the row on
    value    X1 = K   X2 = Q   Z = dO   the same, as it is           columns from the row on
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import known_size
from attnfx.lowering.templates.tiles import column_pointers, head_base, row_pointers

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, acc, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b in float32, of operands in bfloat16 where HALF; float16 would overflow."""
    if HALF:
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["heads", "x_group", "y_group", "N", "chunk"])
def linear_states(
    x,
    y,
    states,
    sums,
    scale,
    add,
    decay,
    x_strides,
    y_strides,
    heads,
    x_group,
    y_group,
    N,
    chunk,
    BACK: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """states (B,H,T,D,E) fp32: x^T y of each chunk, x (B,.,N,D) times lam^(end-1-j), and sums (B,H,T,D) of the same x.

    BACK: x times lam^(i-first+1) instead, y times `scale` (B,H,N), the sums of x times `add` (B,H,N): the gradient of a state that
    a chunk reads. Grid (T * blocks of D * blocks of E * B * H,).
    """
    chunks, d_blocks, e_blocks = tl.cdiv(N, chunk), tl.cdiv(D, BLOCK_D), tl.cdiv(E, BLOCK_E)
    at = tl.program_id(0)
    t = at % chunks
    d_block = at // chunks % d_blocks
    e_block = at // (chunks * d_blocks) % e_blocks
    bh = at // (chunks * d_blocks * e_blocks)
    b = bh // heads
    h = bh % heads
    first = t * chunk
    known_size(first)
    end = tl.minimum(first + chunk, N)
    offs_d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = e_block * BLOCK_E + tl.arange(0, BLOCK_E)
    x_base = head_base(x, x_strides, b, h // x_group)
    y_base = head_base(y, y_strides, b, h // y_group)
    row_base = bh.to(tl.int64) * N
    log = 0.0
    if DECAY:
        log = tl.load(decay + h) * LOG2E
    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < end
        # x_tile [BLOCK_D, BLOCK], y_tile [BLOCK, BLOCK_E]
        x_tile = tl.load(column_pointers(x_base, x_strides, offs, offs_d), mask=(offs_d < D)[:, None] & inside[None, :], other=0.0)
        y_tile = tl.load(row_pointers(y_base, y_strides, offs, offs_e), mask=inside[:, None] & (offs_e < E)[None, :], other=0.0)
        by = tl.full([BLOCK], 1.0, tl.float32)
        if DECAY:
            power = offs - first + 1 if BACK else tl.maximum(end - 1 - offs, 0)
            by = tl.exp2(log * power)
        if NORMALIZE:
            if BACK:
                total += tl.sum(x_tile * (by * tl.load(add + row_base + offs, mask=inside, other=0.0))[None, :], 1)
                by = by * tl.load(scale + row_base + offs, mask=inside, other=0.0)
            else:
                total += tl.sum(x_tile * by[None, :], 1)
        acc = product(x_tile * by[None, :], y_tile, acc, HALF, PRECISION)
    place = (bh.to(tl.int64) * chunks + t) * D
    state = states + (place + offs_d)[:, None] * E + offs_e[None, :]
    tl.store(state, acc, mask=(offs_d < D)[:, None] & (offs_e < E)[None, :])
    if NORMALIZE and e_block == 0:
        tl.store(sums + place + offs_d, total, mask=offs_d < D)


@triton.jit(do_not_specialize=["heads", "size", "N", "chunk"])
def linear_scan(
    states,
    begun,
    final,
    decay,
    heads,
    size,
    N,
    chunk,
    BACK: tl.constexpr,
    DECAY: tl.constexpr,
    BEGUN: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """states (B,H,T,size) in place: the state before each chunk (BACK: its gradient behind each) in place of what the chunk adds,
    `final` (B,H,size) the one after all, from `begun` or zeros. Without WRITE, `final` alone. Grid (blocks of size * B * H,)."""
    blocks, chunks = tl.cdiv(size, BLOCK), tl.cdiv(N, chunk)
    bh = tl.program_id(0) // blocks
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = offs < size
    log = 0.0
    if DECAY:
        log = tl.load(decay + bh % heads) * LOG2E
    base = bh.to(tl.int64) * size
    carried = tl.zeros([BLOCK], tl.float32)
    if BEGUN:
        carried = tl.load(begun + base + offs, mask=ok, other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):
        t = chunks - 1 - step if BACK else step
        at = states + base * chunks + t.to(tl.int64) * size + offs
        added = tl.load(at, mask=ok, other=0.0)
        if WRITE:
            tl.store(at, carried, mask=ok)
        if DECAY:
            carried = carried * tl.exp2(log * tl.minimum(chunk, N - t * chunk))
        carried += added
    tl.store(final + base + offs, carried, mask=ok)


@triton.jit(do_not_specialize=["heads", "group", "M", "chunk", "eps"])
def linear_mix(
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
    chunk,
    eps,
    MODE: tl.constexpr,
    CAUSAL: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    W: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DIVISOR: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out` (B,.,M,E) in the form above; `states` by strides (batch and head, chunk, W, E), one for all where not CAUSAL.

    `sums` (B,H,M) fp32 of the weights where MODE is "output", divided by as DIVISOR says: "add" l + eps, "max" max(l, eps),
    "max_abs" max(|l|, eps); of a gradient, `scale` and `add` (B,H,M) are those of the queries: 1 / divisor, and the gradient of l.
    `state_sums` (B,H,chunks or 1,D). Key and value gradients add up over the `group` query heads of a key head. Grid (tiles of
    rows * blocks of E * B * heads of out,).
    """
    UPPER: tl.constexpr = MODE == "key" or MODE == "value"
    tiles, e_blocks = tl.cdiv(M, BLOCK), tl.cdiv(E, BLOCK_E)
    tile = tl.program_id(0) % tiles
    e_block = tl.program_id(0) // tiles % e_blocks
    owner = tl.program_id(0) // (tiles * e_blocks)
    owners = heads
    repeats = 1
    if UPPER:
        owners = heads // group
        repeats = group
    b = owner // owners
    own = owner % owners
    begin = tile * BLOCK
    known_size(begin)
    rows = begin + tl.arange(0, BLOCK)
    row_ok = rows < M
    offs_e = e_block * BLOCK_E + tl.arange(0, BLOCK_E)
    e_ok = offs_e < E
    t = 0
    first = 0
    if CAUSAL:
        t = begin // chunk
        first = t * chunk
    end = tl.minimum(first + chunk, M)
    chunks = tl.cdiv(M, chunk) if CAUSAL else 1
    acc = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for r in range(repeats):
        h = own
        if UPPER:
            h = own * group + r
        bh = b * heads + h
        log = 0.0
        if DECAY:
            log = tl.load(decay + h) * LOG2E
        row_base = bh.to(tl.int64) * M
        # X1 has the heads of `out`; of X2 and Z, the query heads' in UPPER, else the keys'
        x1_base = head_base(x1, x1_strides, b, own)
        other = h if UPPER else h // group
        x2_base = head_base(x2, x2_strides, b, other)
        z_base = head_base(z, z_strides, b, other)
        state = states + bh.to(tl.int64) * state_strides[0] + tl.cast(t, tl.int64) * state_strides[1]
        vector = state_sums + (bh.to(tl.int64) * chunks + t) * (W if MODE == "output" else E)

        part = tl.zeros([BLOCK, BLOCK_E], tl.float32)
        seen = tl.zeros([BLOCK], tl.float32)
        for w in range(0, W, BLOCK_W):
            offs_w = w + tl.arange(0, BLOCK_W)
            w_ok = offs_w < W
            x_tile = tl.load(row_pointers(x1_base, x1_strides, rows, offs_w), mask=row_ok[:, None] & w_ok[None, :], other=0.0)
            s_tile = tl.load(
                state + offs_w[:, None] * state_strides[2] + offs_e[None, :] * state_strides[3],
                mask=w_ok[:, None] & e_ok[None, :],
                other=0.0,
            )
            part = product(x_tile, s_tile, part, HALF, PRECISION)
            if NORMALIZE and MODE == "output":
                seen += tl.sum(x_tile * tl.load(vector + offs_w, mask=w_ok, other=0.0)[None, :], 1)
        scales = seen
        adds = seen
        if NORMALIZE and MODE == "query":
            scales = tl.load(scale + row_base + rows, mask=row_ok, other=0.0)
            adds = tl.load(add + row_base + rows, mask=row_ok, other=0.0)
            part = part * scales[:, None] + adds[:, None] * tl.load(vector + offs_e, mask=e_ok, other=0.0)[None, :]
        elif NORMALIZE and MODE == "key":
            part += tl.load(vector + offs_e, mask=e_ok, other=0.0)[None, :]
        if DECAY:
            power = tl.maximum(end - 1 - rows, 0) if UPPER else rows - first + 1
            by = tl.exp2(log * power)
            part = part * by[:, None]
            seen = seen * by
        acc += part
        if CAUSAL:
            l += seen
            for start in range(begin if UPPER else first, end if UPPER else tl.minimum(begin + BLOCK, end), BLOCK):
                columns = start + tl.arange(0, BLOCK)
                column_ok = columns < end
                weights = tl.zeros([BLOCK, BLOCK], tl.float32)
                for w in range(0, W, BLOCK_W):
                    offs_w = w + tl.arange(0, BLOCK_W)
                    w_ok = offs_w < W
                    x_tile = tl.load(
                        row_pointers(x1_base, x1_strides, rows, offs_w), mask=row_ok[:, None] & w_ok[None, :], other=0.0
                    )
                    y_tile = tl.load(
                        column_pointers(x2_base, x2_strides, columns, offs_w), mask=w_ok[:, None] & column_ok[None, :], other=0.0
                    )
                    weights = product(x_tile, y_tile, weights, HALF, PRECISION)
                if NORMALIZE and MODE == "query":
                    weights = weights * scales[:, None] + adds[:, None]
                elif NORMALIZE and UPPER:
                    weights = weights * tl.load(scale + row_base + columns, mask=column_ok, other=0.0)[None, :]
                    if MODE == "key":
                        weights += tl.load(add + row_base + columns, mask=column_ok, other=0.0)[None, :]
                behind = columns[None, :] - rows[:, None] if UPPER else rows[:, None] - columns[None, :]
                if DECAY:
                    weights = weights * tl.exp2(log * tl.maximum(behind, 0))
                weights = tl.where((behind >= 0) & column_ok[None, :], weights, 0.0)
                if NORMALIZE and MODE == "output":
                    l += tl.sum(weights, 1)
                z_tile = tl.load(
                    row_pointers(z_base, z_strides, columns, offs_e), mask=column_ok[:, None] & e_ok[None, :], other=0.0
                )
                acc = product(weights, z_tile, acc, HALF, PRECISION)
        else:
            l += seen
    if NORMALIZE and MODE == "output":
        below = l + eps
        if DIVISOR == "max":
            below = tl.maximum(l, eps)
        elif DIVISOR == "max_abs":
            below = tl.maximum(tl.abs(l), eps)
        acc = acc / below[:, None]
        if e_block == 0:
            tl.store(sums + owner.to(tl.int64) * M + rows, l, mask=row_ok)
    out_base = head_base(out, out_strides, b, own)
    acc = acc.to(out.dtype.element_ty)
    tl.store(row_pointers(out_base, out_strides, rows, offs_e), acc, mask=row_ok[:, None] & e_ok[None, :])
