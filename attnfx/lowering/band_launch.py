"""The host side of bands in kernels: their arguments, and the blocks that suit them."""

from __future__ import annotations

from typing import Any

from attnfx.lowering.bands import Arguments
from attnfx.lowering.configs import Config, padded
from attnfx.lowering.descriptors import describe, serves


def launched(band: Arguments | None, config: Config, target: str) -> tuple[Any, Any, Any]:
    """The arguments `left`, `window` and `band` of a kernel: the tensors, or descriptors of tiles of both where they can have
    one."""
    if band is None:
        return None, None, None
    left, left_strides, window, strides, factor = band
    if config.tma and all(serves(target, x) for x in (left, window) if x is not None):
        of_left, of_window = (None if x is None else describe(x, config.block_n, padded(x.shape[3])) for x in (left, window))
        return of_left, of_window, (left_strides, strides, 1, factor)
    return left, window, (left_strides, strides, None, factor)
