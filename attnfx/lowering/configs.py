"""Default block sizes, warps and pipeline stages: what to run before, or without, any tuning.

Half precision on sm90 is measured on an H200, over plain, causal and masked attention with and without a table of distances; where
a few registers that spill cost less than a smaller tile, `Config.spills` says how much may. The other entries are the first of
a list, from fast to frugal, that compile without spills for the heaviest sample program (dense relative bias, mask, exact
rows; `attnfx/lowering/crosscompile.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kernel = Literal["forward", "query_gradient", "key_gradient", "tile_bias", "column_bias", "diagonal_bias"]
KERNELS: tuple[Kernel, ...] = ("forward", "query_gradient", "key_gradient", "tile_bias", "column_bias", "diagonal_bias")

#: Rows (or keys) that share one list of tiles, and keys (or rows) of a tile in a list; templates/tiles.py says so too.
OWN, WALKED = 64, 64

# bytes of shared memory one block may use
SHARED_LIMIT = {
    "sm80": 166_912,
    "sm86": 101_376,
    "sm89": 101_376,
    "sm90": 232_448,
    "sm100": 232_448,
    "sm120": 101_376,
    "gfx942": 65_536,
}


@dataclass(frozen=True)
class Config:
    """Tile rows of queries (`block_m`) and keys (`block_n`), warps a block, and stages of the software pipeline; `tma`: tiles are
    read by tensor descriptors where that is possible; `spills`: bytes a thread that may spill, measured to be worth it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = True
    spills: int = 0


@dataclass(frozen=True)
class Tile:
    """Of the split-KV kernels (`decode.py`): keys a tile (`block_n`), warps a block, and stages of the software pipeline; `splits`:
    programs that share the keys of a row, 0: as many as fill the device."""

    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 0


#: What runs a kernel: of the flash kernels, or of the split-KV kernels.
Choice = Config | Tile


# for padded head dimensions up to 32, up to 64, up to 128, up to 256
Widths = tuple[Config, Config, Config, Config]


@dataclass(frozen=True)
class Table:
    """The defaults of one target in one class of dtypes; the three kinds of bias gradient share theirs."""

    forward: Widths
    query_gradient: Widths
    key_gradient: Widths
    bias: Widths


# float16 and bfloat16
HALF: dict[str, Table] = {
    "sm90": Table(
        forward=(Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 32, 8, 2)),
        query_gradient=(Config(64, 32, 4, 3), Config(64, 64, 4, 2), Config(128, 64, 8, 3, spills=64), Config(64, 32, 8, 2)),
        key_gradient=(
            Config(64, 128, 4, 3, spills=352),
            Config(64, 64, 4, 3, spills=32),
            Config(64, 64, 4, 2, spills=128),
            Config(32, 32, 8, 1, tma=False),
        ),
        bias=(Config(32, 32, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 3, spills=128), Config(32, 32, 8, 1, tma=False)),
    ),
    "sm80": Table(
        forward=(Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        query_gradient=(Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        key_gradient=(Config(32, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 1)),
        bias=(Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 1)),
    ),
    "sm100": Table(
        forward=(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        query_gradient=(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
        key_gradient=(Config(32, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
        bias=(Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ),
    "gfx942": Table(
        forward=(Config(128, 64, 4, 3), Config(128, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
        query_gradient=(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
        key_gradient=(Config(32, 64, 4, 2), Config(32, 64, 4, 2), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
        bias=(Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    ),
}
#: Forward in half precision where nothing is masked, by padded head dimension.
OPEN: dict[str, dict[int, Config]] = {"sm90": {64: Config(64, 128, 4, 2), 128: Config(128, 64, 4, 2, spills=256)}}
#: The same where the scores read numbers of their keys: those want registers, too.
LOADED: dict[str, dict[int, Config]] = {"sm90": {64: Config(64, 128, 4, 2), 128: Config(128, 128, 8, 3)}}
#: Forward in half precision where the scores are a factor and a mask that is no narrow window has formulas for its ends.
BOUNDED: dict[str, dict[int, Config]] = {"sm90": {64: Config(64, 128, 4, 2)}}
#: Backward in half precision where a query reads few tiles of keys, by padded head dimension.
NARROW: dict[str, dict[Kernel, dict[int, Config]]] = {"sm90": {"query_gradient": {128: Config(64, 64, 4, 2)}}}
#: Forward in half precision over lists of tiles, by padded head dimension.
LISTED: dict[str, dict[int, Config]] = {"sm90": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2)}}
#: The gradient of a bias with a number for each pair in half precision, by padded head dimension.
TILED: dict[str, dict[int, Config]] = {"sm90": {32: Config(32, 64, 4, 3)}}
# float32
FULL: dict[str, Table] = {
    "sm90": Table(
        forward=(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
        query_gradient=(Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
        key_gradient=(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
        bias=(Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    ),
    "sm80": Table(
        forward=(Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(64, 32, 8, 2), Config(16, 16, 8, 2)),
        query_gradient=(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 1)),
        key_gradient=(Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 1)),
        bias=(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(32, 32, 8, 1)),
    ),
    "sm100": Table(
        forward=(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
        query_gradient=(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 1)),
        key_gradient=(Config(16, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 32, 8, 2), Config(16, 32, 8, 1)),
        bias=(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(32, 32, 8, 1)),
    ),
    "gfx942": Table(
        forward=(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 16, 4, 1), Config(32, 16, 8, 1)),
        query_gradient=(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
        key_gradient=(Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1), Config(16, 16, 4, 1)),
        bias=(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
    ),
}


def padded(head_dim: int) -> int:
    """The power of two >= 16 that holds a head dimension: what `tl.dot` takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def target_of(device: torch.device) -> str:
    """The key of SHARED_LIMIT for a device; a CPU (Triton's interpreter) reads as sm90."""
    if device.type != "cuda":
        return "sm90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    exact, family = f"sm{major}{minor}", f"sm{major}0"
    return exact if exact in SHARED_LIMIT else family if family in SHARED_LIMIT else "sm86"


def default(kernel: Kernel, dtype: torch.dtype, head_dim: int, value_dim: int, target: str) -> Config:
    """The table's entry for the wider of the two head dimensions (1 to 256) on `target` (a key of SHARED_LIMIT)."""
    # chips with about 100 KB take what fits in AMD's 64 KB
    known = target if target in HALF else "gfx942"
    table = (FULL if dtype == torch.float32 else HALF)[known]
    widths: Widths = table.bias if kernel.endswith("bias") else getattr(table, kernel)
    width = max(padded(head_dim), padded(value_dim))
    if kernel == "tile_bias" and dtype != torch.float32 and width in TILED.get(target, {}):
        return TILED[target][width]
    return widths[0 if width <= 32 else 1 if width <= 64 else 2 if width <= 128 else 3]


def opened(config: Config, head_dim: int, value_dim: int, target: str, loaded: bool) -> Config:
    """What runs forward in place of `config`, a default in half precision, where nothing is masked; `loaded`: as in `LOADED`."""
    return (LOADED if loaded else OPEN).get(target, {}).get(max(padded(head_dim), padded(value_dim)), config)


def bounded(config: Config, head_dim: int, value_dim: int, target: str) -> Config:
    """What runs forward in place of `config`, a default in half precision, under a mask as `BOUNDED` says."""
    return BOUNDED.get(target, {}).get(max(padded(head_dim), padded(value_dim)), config)


def narrowed(kernel: Kernel, config: Config, head_dim: int, value_dim: int, target: str) -> Config:
    """What runs in place of `config`, a default in half precision, where a window keeps few tiles of keys."""
    return NARROW.get(target, {}).get(kernel, {}).get(max(padded(head_dim), padded(value_dim)), config)


def walked(config: Config, head_dim: int, value_dim: int, target: str) -> Config:
    """What runs forward in place of `config`, a default in half precision, over lists of tiles."""
    return LISTED.get(target, {}).get(max(padded(head_dim), padded(value_dim)), config)


def relieved(config: Config) -> Config:
    """`config` with blocks of at most 64 and its warps: a factor of the probabilities is one tile more in the registers. What
    already spilled gets half the rows and eight warps, and spills nothing."""
    small = replace(config, block_m=min(config.block_m, 64), block_n=min(config.block_n, 64), spills=0)
    return replace(small, block_m=32, num_warps=8) if config.spills and config.num_warps < 8 else small


def listed(kernel: Kernel, config: Config) -> Config:
    """`config` with blocks no larger than the tiles of lists: a kernel's own tile has one list, and walks whole tiles of it."""
    own, walked = ("block_n", "block_m") if kernel == "key_gradient" else ("block_m", "block_n")
    return replace(config, **{own: min(getattr(config, own), OWN), walked: min(getattr(config, walked), WALKED)})


def fitted(config: Config, m: int, n: int) -> Config:
    """`config` with blocks no larger than the sequence needs: 49 tokens do not want 128 rows."""
    block_m, block_n = min(config.block_m, padded(m)), min(config.block_n, padded(n))
    # half the tile or less: four warps have enough to do
    small = block_m * block_n * 2 <= config.block_m * config.block_n
    return replace(config, block_m=block_m, block_n=block_n, num_warps=min(config.num_warps, 4) if small else config.num_warps)
