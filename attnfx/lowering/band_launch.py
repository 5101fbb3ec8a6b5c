"""The host side of bands in kernels: their arguments, and the blocks that suit them."""

from __future__ import annotations

from typing import Any

import torch

from attnfx.lowering.bands import Arguments
from attnfx.lowering.configs import Config, padded


def launched(band: Arguments | None) -> tuple[Any, Any, Any]:
    """The arguments `left`, `window` and `band` of a kernel."""
    if band is None:
        return None, None, None
    left, window, strides, factor = band
    if window.stride(3) != 1:
        window = window.contiguous()
        strides = tuple(s and of for s, of in zip(strides, window.stride(), strict=True))
    if left is not None and left.stride(3) != 1:
        left = left.contiguous()
    # Triton 3.6 loses the type of a number that is known to be 1, or of None, in a tuple of tuples
    return left, window, ((0, 0, 0) if left is None else left.stride()[:3], strides[:3], factor)


def suited(kernel: str, dtype: torch.dtype, head_dim: int, value_dim: int, target: str) -> Config:
    """The square tiles, warps and stages of a kernel with a band; measured on an H200 for width 128 in half precision, and nowhere
    else."""
    known = target if target in _FORWARD else "gfx942"
    width = max(padded(head_dim), padded(value_dim))
    of = 0 if width <= 64 else 1 if width <= 128 else 2
    if dtype == torch.float32:
        return _FULL[of]
    if kernel.endswith("bias"):
        return _WINDOW.get(known, _GRADIENT["sm80" if of == 1 else known])[of]  # tiles of all four operands and two sums
    if kernel == "query_gradient" and of == 1 and known == "sm90":
        return _square(32, 4, 2, spills=448)
    return (_FORWARD if kernel == "forward" else _GRADIENT)[known][of]


def _square(side: int, warps: int, stages: int, spills: int = 0, tma: bool = True) -> Config:
    return Config(side, side, warps, stages, tma, spills)


# for padded head dimensions up to 64, up to 128, up to 256, in half precision; where nothing is measured, of those that compile for
# a sample (causal, rows of their own) the largest that spill little
_NARROW = _square(16, 8, 1, spills=448)
_FORWARD = {
    "sm90": (_square(64, 4, 2), _square(64, 4, 2, spills=16), _NARROW),
    "sm100": (_square(64, 4, 2), _square(64, 8, 2), _NARROW),
    "sm80": (_square(64, 8, 2), _square(32, 8, 2), _NARROW),
    "gfx942": (_square(64, 4, 1), _square(32, 4, 1), _square(16, 4, 1)),
}
_GRADIENT = {
    "sm90": (_square(64, 8, 2, spills=192), _square(64, 8, 2, spills=384), _NARROW),
    "sm100": (_square(64, 8, 2), _square(32, 8, 2), _NARROW),
    "sm80": (_square(32, 8, 2), _square(32, 8, 2), _NARROW),
    "gfx942": (_square(32, 4, 1), _square(32, 4, 1), _square(16, 4, 1)),
}
# what a descriptor reads in a tile that is not always visited takes more registers than what pointers read
_WINDOW = {
    "sm90": (_square(64, 8, 2, tma=False), _square(64, 8, 2, spills=192, tma=False), _square(16, 8, 1, spills=448, tma=False))
}
_FULL = (_square(32, 8, 1, spills=64), _square(16, 8, 1, spills=64), _square(16, 8, 1, spills=576))
