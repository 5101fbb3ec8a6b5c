"""Sample generated programs, as the code generator would write them: what the cross-compilation check compiles."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering.templates.arithmetic import gathered

LOG2E = tl.constexpr(1.4426950408889634)
SCALE = tl.constexpr(0.25)
FAR = tl.constexpr(2147483647)


@triton.jit
def plain(dot, b, h, i, j, loads, ints):
    return dot * (SCALE * LOG2E)


@triton.jit
def plain_grad(dot, b, h, i, j, loads, ints):
    return SCALE


@triton.jit
def relative_bias(dot, b, h, i, j, loads, ints):
    """loads[0] indexed [h, i - j + ints[1]] with stride ints[0] for h."""
    return (dot * SCALE + gathered(loads[0] + h * ints[0] + (i - j + ints[1]))) * LOG2E


@triton.jit
def relative_gate(b, h, i, j, loads, ints):
    """A factor of the probabilities from the table that `relative_bias` adds."""
    return gathered(loads[0] + h * ints[0] + (i - j + ints[1]))


@triton.jit
def causal(b, h, i, j, loads, ints):
    """ints[-1]: how far ahead a row may see."""
    return j <= i + ints[len(ints) - 1]


@triton.jit
def causal_keys(i_first, i_last, ints):
    ahead = ints[len(ints) - 1]
    return 0, 0, i_first + ahead + 1, i_last + ahead + 1


@triton.jit
def causal_rows(j_first, j_last, ints):
    ahead = ints[len(ints) - 1]
    return j_first - ahead, j_last - ahead, FAR, FAR


@triton.jit
def window(b, h, i, j, loads, ints):
    """The last 4096 keys."""
    return (j <= i) & (i <= (j + 4095))


@triton.jit
def window_keys(i_first, i_last, ints):
    return i_first - 4095, i_last - 4095, i_first + 1, i_last + 1


@triton.jit
def window_rows(j_first, j_last, ints):
    return j_first, j_last, j_first + 4096, j_last + 4096


@triton.jit
def padded_causal(b, h, i, j, loads, ints):
    """loads[0]: bool (B, N), row stride ints[0]; and j <= i + ints[1]."""
    return tl.load(loads[0] + b * ints[0] + j) & (j <= i + ints[1])


@triton.jit
def padded_causal_keys(i_first, i_last, ints):
    return 0, 0, 0, i_last + ints[1] + 1


@triton.jit
def padded_causal_rows(j_first, j_last, ints):
    return j_first - ints[1], FAR, FAR, FAR
