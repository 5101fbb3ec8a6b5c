"""The Triton kernels: plain `@triton.jit` functions that take the generated programs as `tl.constexpr` arguments.

Letters: b batch, h query head, i query row, j key, d head dimension. A *score program* turns raw dots into base-2
logits, a *keep program* says which (i, j) take part, and a *range program* bounds them tile by tile;
`attnfx/lowering/flash.py` is the host side and states what each must compute.
"""
