"""Which configurations are worth a look: a grid of tiles and warps first, then the neighbours of what did best there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch

from attnfx.lowering import descriptors
from attnfx.lowering.configs import Choice, Config, Kernel, Tile, listed, padded
from attnfx.lowering.decode import SPLITS
from attnfx.lowering.tuning.shapes import Shape

DECODE = "decode"
#: Kernels that can read their tiles by tensor descriptors.
DESCRIBED = ("forward", "query_gradient", "key_gradient")


@dataclass(frozen=True)
class Space:
    """The values that each field of a configuration may take."""

    block_m: tuple[int, ...]
    block_n: tuple[int, ...]
    warps: tuple[int, ...]
    stages: tuple[int, ...]


_HALF: dict[str, Space] = {
    "forward": Space((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)),
    "query_gradient": Space((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "key_gradient": Space((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "bias": Space((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    DECODE: Space((16,), (32, 64, 128), (2, 4, 8), (1, 2, 3, 4)),
}
_FULL: dict[str, Space] = {
    "forward": Space((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)),
    "query_gradient": Space((16, 32, 64), (16, 32, 64), (4, 8), (1, 2)),
    "key_gradient": Space((16, 32, 64), (16, 32, 64), (4, 8), (1, 2)),
    "bias": Space((16, 32, 64), (16, 32, 64), (4, 8), (1, 2)),
    DECODE: Space((16,), (16, 32, 64), (2, 4, 8), (1, 2, 3)),
}
#: Sequences up to this long (windows of an image) also get tiles and warps that are too small for others.
SHORT = 64


def space(kernel: str, shape: Shape) -> Space:
    """The values for a kernel ("decode", or a `configs.Kernel`) in calls like ``shape``: no tile is larger than its sequence."""
    table = _FULL if shape.dtype == torch.float32 else _HALF
    found = table["bias" if kernel.endswith("bias") else kernel]
    if kernel == DECODE:
        return found
    if max(shape.queries, shape.keys) <= SHORT:
        found = replace(found, block_m=(16, *found.block_m), block_n=(16, *found.block_n), warps=(1, 2, *found.warps))
    return replace(found, block_m=_within(found.block_m, shape.queries), block_n=_within(found.block_n, shape.keys))


def coarse(kernel: str, shape: Shape, start: Choice) -> list[Choice]:
    """The grid of tiles and warps, the other fields as in ``start``, what runs without a search; without ``start`` itself."""
    found = space(kernel, shape)
    if isinstance(start, Tile):
        splits = {start.splits, *(s for s in (start.splits // 2, start.splits * 2) if 1 <= s <= SPLITS)}
        grid: list[Choice] = [replace(start, block_n=n, num_warps=w) for n, w in product(found.block_n, found.warps)]
        grid += [replace(start, splits=s) for s in sorted(splits)]
    else:
        sizes = product(found.block_m, found.block_n, found.warps)
        grid = [replace(start, block_m=m, block_n=n, num_warps=w, spills=0) for m, n, w in sizes]
    return _allowed(kernel, shape, grid, [start])


def near(kernel: str, shape: Shape, target: str, leaders: Sequence[Choice], known: Sequence[Choice]) -> list[Choice]:
    """What differs from one of the ``leaders`` in one field, best leader first, and is not ``known``."""
    found = space(kernel, shape)
    moved: list[Choice] = []
    for leader in leaders:
        moved += [replace(leader, num_stages=stages) for stages in found.stages]
        if isinstance(leader, Tile):
            around = (leader.splits // 2, leader.splits * 3 // 2, leader.splits * 2)
            moved += [replace(leader, splits=s) for s in around if 1 <= s <= SPLITS]
        elif described(kernel, shape, target):
            moved.append(replace(leader, tma=not leader.tma))
    return _allowed(kernel, shape, moved, known)


def described(kernel: str, shape: Shape, target: str) -> bool:
    """Whether tensor descriptors may read the tiles of a kernel (`descriptors.py`)."""
    long = min(shape.queries, shape.keys) >= descriptors.ROWS
    return long and shape.dense and shape.dtype.itemsize == 2 and target in descriptors.TARGETS and kernel in DESCRIBED


def _within(blocks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The blocks that a sequence fills; the smallest where it fills none."""
    return tuple(b for b in blocks if b <= padded(max(size, 1))) or blocks[:1]


def _allowed(kernel: str, shape: Shape, grid: Sequence[Choice], known: Sequence[Choice]) -> list[Choice]:
    """``grid`` as the kernel would take it, each once and none of ``known``."""
    seen = set(known)
    return [c for c in _fitting(kernel, shape, grid) if not (c in seen or seen.add(c))]  # type: ignore[func-returns-value]


def _fitting(kernel: str, shape: Shape, grid: Sequence[Choice]) -> Iterator[Choice]:
    for choice in grid:
        if isinstance(choice, Config) and shape.lists:
            choice = listed(cast(Kernel, kernel), choice)
        if isinstance(choice, Tile):
            choice = replace(choice, splits=min(choice.splits, -(-shape.keys // choice.block_n)))
        if isinstance(choice, Tile) or kernel != "diagonal_bias" or choice.block_m == choice.block_n:
            yield choice
