"""Sample generated programs, beside those that ship for the cross-compilation check: what codegen would emit."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.samples import (
    causal,
    causal_keys,
    causal_rows,
    padded_causal,
    padded_causal_keys,
    padded_causal_rows,
    plain,
    plain_grad,
    relative_bias,
    relative_gate,
)

LOG2E = tl.constexpr(1.4426950408889634)
SCALE = tl.constexpr(0.25)
CAP = tl.constexpr(2.0)

__all__ = [
    "alibi",
    "causal",
    "causal_keys",
    "causal_rows",
    "dense_bias",
    "every_third",
    "padded_causal",
    "padded_causal_keys",
    "padded_causal_rows",
    "padding",
    "padding_gate",
    "plain",
    "plain_grad",
    "relative_bias",
    "relative_gate",
    "softcap",
    "softcap_grad",
    "tanh",
    "window",
    "window_keys",
    "window_rows",
]


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) with e <= 1 cannot overflow
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def softcap(dot, b, h, i, j, loads, ints):
    return CAP * LOG2E * tanh(dot * (SCALE / CAP))


@triton.jit
def softcap_grad(dot, b, h, i, j, loads, ints):
    t = tanh(dot * (SCALE / CAP))
    return SCALE * (1.0 - t * t)


@triton.jit
def alibi(dot, b, h, i, j, loads, ints):
    """loads[0]: slopes (H,)."""
    return (dot * SCALE + tl.load(loads[0] + h) * (j - i)) * LOG2E


@triton.jit
def dense_bias(dot, b, h, i, j, loads, ints):
    """loads[0] indexed [b, h, i, j] with strides ints[0:4], 0 where it is broadcast."""
    at = tl.cast(b, tl.int64) * ints[0] + tl.cast(h, tl.int64) * ints[1] + i.to(tl.int64) * ints[2] + j * ints[3]
    return (dot * SCALE + tl.load(loads[0] + at)) * LOG2E


@triton.jit
def window(b, h, i, j, loads, ints):
    """ints[0]: how many keys a row sees, its own the last."""
    return (j <= i) & (i - j < ints[0])


@triton.jit
def window_keys(i_first, i_last, ints):
    return i_first - ints[0] + 1, i_last - ints[0] + 1, i_first + 1, i_last + 1


@triton.jit
def window_rows(j_first, j_last, ints):
    return j_first, j_last, j_first + ints[0], j_last + ints[0]


@triton.jit
def padding(b, h, i, j, loads, ints):
    """loads[0]: bool (B, N), row stride ints[0]."""
    return tl.load(loads[0] + b * ints[0] + j)


@triton.jit
def padding_gate(b, h, i, j, loads, ints):
    """loads[0]: bool (B, N), row stride ints[0]: 1.5 where it is set, else 0."""
    return tl.where(tl.load(loads[0] + b * ints[0] + j), 1.5, 0.0)


@triton.jit
def every_third(b, h, i, j, loads, ints):
    return tl.where((i + 2 * j + h) % 3 == 0, 0.0, 1.25)
