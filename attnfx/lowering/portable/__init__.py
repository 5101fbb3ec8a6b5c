"""The flash family's plans in plain torch operations, a block of query rows at a time: for CPUs and devices without Triton.

Memory is O(rows of a block * N); float32 arithmetic for half precision, float64 for float64. Keys that the mask's closed-form
bounds exclude are not visited, nor tiles that another mask keeps nothing of: a causal mask costs half, a window the window, a
document itself, blocks chosen from the data those blocks.
"""

from attnfx.lowering.portable.backward import backward, of_rows
from attnfx.lowering.portable.forward import Result, forward, new_result

__all__ = ["Result", "backward", "forward", "new_result", "of_rows"]
