"""Arithmetic that generated programs call by name: torch's meaning of each, on NVIDIA, AMD and in the interpreter."""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnfx.lowering import checks, launch

LOG2E = tl.constexpr(1.4426950408889634)
# below any real score, above finfo.min of float32 and bfloat16 divided by log2(e)
MASKED_OUT = tl.constexpr(-1e38)


# queries and keys that a kernel takes
LONGEST = tl.constexpr(checks.LONGEST)


@triton.jit
def known_size(n):
    """Tells the compiler that a number of rows or keys is neither negative nor LONGEST: sums of such numbers then do not overflow,
    and the addresses of a tile become one address and constants."""
    tl.assume(n >= 0)
    tl.assume(n < LONGEST)


@triton.constexpr_function
def on_nvidia():
    """Whether the kernel is being compiled for NVIDIA."""
    return launch.backend() == "cuda"


@triton.jit
def gathered(pointers):
    """What a tile of scattered addresses holds, read straight into registers.

    The software pipeline stages a load of a loop in shared memory, element by element where addresses are scattered: that
    costs more than all of the attention around it. It does not look into assembly, which also leaves a loop that does not
    change its addresses.
    """
    if on_nvidia():
        if pointers.dtype.element_ty == tl.float32:
            found = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=f,l", [pointers], tl.float32, True, 1)
        elif pointers.dtype.element_ty == tl.int32:
            found = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [pointers], tl.int32, True, 1)
        elif pointers.dtype.element_ty == tl.int64:
            found = tl.inline_asm_elementwise("ld.global.nc.b64 $0, [$1];", "=l,l", [pointers], tl.int64, True, 1)
        else:
            bits = tl.inline_asm_elementwise("ld.global.nc.b16 $0, [$1];", "=h,l", [pointers], tl.int16, True, 1)
            found = bits.to(pointers.dtype.element_ty, bitcast=True)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def to_base_2(bias):
    """bias * log2(e), except that a mask's finfo.min stays finite: it would become -inf, which means something else."""
    return tl.where(bias < MASKED_OUT, bias, bias * LOG2E)


@triton.jit
def tanh(x):
    """2 / (1 + exp(-2|x|)) - 1 with the sign of x; exact at 0 and at infinity."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def floor_divide(a, b):
    """floor(a / b) of integers; Triton's own rounds towards zero."""
    top = tl.where(b < 0, -a, a)
    bottom = tl.where(b < 0, -b, b)
    return tl.where(top < 0, -((bottom - 1 - top) // bottom), top // bottom)


@triton.jit
def floor_modulo(a, b):
    """a - b * floor(a / b) of integers."""
    return a - floor_divide(a, b) * b


@triton.jit
def float_modulo(a, b):
    """a - b * floor(a / b) of floats."""
    return a - tl.floor(a / b) * b


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x rounded to a narrower float type, in float32: what the model's own half-precision arithmetic did."""
    return tl.cast(tl.cast(x, DTYPE), tl.float32)
