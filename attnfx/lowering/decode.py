"""Host side of the split-KV kernels: which calls they serve, over how many programs the keys are split, the two launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnfx.lowering import skips
from attnfx.lowering.configs import Tile, padded, target_of
from attnfx.lowering.launch import recorded_target, run
from attnfx.lowering.templates.decode import decode_merge, decode_partial
from attnfx.lowering.tuning.lookup import tuned_tile

if TYPE_CHECKING:
    from attnfx.lowering.call import Call, Program, Residuals

#: Up to this many queries a call is a decode step; the row tile holds them for all heads that share a key head.
QUERIES = 16
#: Fewer keys than this are not worth a second kernel.
KEYS = 256
#: Rows of a tile: as many as there are, up to this.
ROWS = 64
#: Programs that share a multiprocessor, and the most programs that share the keys of a row.
RESIDENT = 2
SPLITS = 128
#: Splits that the merging kernel reads at once.
MERGED = 16
#: Multiprocessors where no device says how many.
MULTIPROCESSORS = {"cpu": 8, "meta": 132}


# for padded head dimensions up to 64, up to 128, up to 256; float16 and bfloat16, and float32
_HALF: dict[str, tuple[Tile, Tile, Tile]] = {
    "sm90": (Tile(64, 4, 3), Tile(64, 4, 3), Tile(32, 4, 3)),
    "sm80": (Tile(64, 4, 3), Tile(64, 4, 2), Tile(32, 4, 2)),
    "gfx942": (Tile(64, 4, 2), Tile(32, 4, 2), Tile(32, 4, 1)),
}
_FULL: dict[str, tuple[Tile, Tile, Tile]] = {
    "sm90": (Tile(32, 8, 2), Tile(32, 8, 2), Tile(16, 4, 2)),
    "sm80": (Tile(32, 4, 2), Tile(32, 4, 2), Tile(16, 4, 2)),
    "gfx942": (Tile(32, 4, 2), Tile(16, 4, 2), Tile(16, 4, 1)),
}


def tile(dtype: torch.dtype, head_dim: int, value_dim: int, target: str) -> Tile:
    """The default for the wider of the two head dimensions (1 to 256) on a target (a key of `configs.SHARED_LIMIT`)."""
    known = "gfx942" if target.startswith("gfx") else "sm90" if target in ("sm90", "sm100") else "sm80"
    width = max(padded(head_dim), padded(value_dim))
    return (_FULL if dtype == torch.float32 else _HALF)[known][0 if width <= 64 else 1 if width <= 128 else 2]


def serves(queries: int, keys: int) -> bool:
    """Whether few enough queries read enough keys."""
    return 1 <= queries <= QUERIES and keys >= KEYS


def split_count(programs: int, key_tiles: int, multiprocessors: int) -> int:
    """Over how many programs the keys of a row are split: as many as fill the device beside the `programs` that are there
    anyway, and no more than there are tiles of keys."""
    return max(1, min(RESIDENT * multiprocessors // max(programs, 1), key_tiles, SPLITS))


def multiprocessors(device: torch.device) -> int:
    """How many a device has; a fixed number for CPUs (Triton's interpreter) and for meta tensors."""
    if device.type != "cuda":
        return MULTIPROCESSORS[device.type]
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _of_gpu(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def launch(
    call: Call,
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    splits: int | None = None,
    chosen: Tile | None = None,
) -> None:
    """Fills `out` and `residuals` of a checked `call`, as `flash_forward` would.

    `splits` and `chosen` override what the sizes and the device ask for. Nothing is compiled anew for other numbers of keys.
    """
    target, skip = recorded_target() or target_of(q.device), program.skip
    if skip is not None:
        chosen = skips.tile(skip, q.dtype, call.d, call.dv, target)
    chosen = chosen or tuned_tile(program.key, q, k, v, call.switches["DROPOUT"])
    chosen = chosen or tile(q.dtype, call.d, call.dv, target)
    rows = call.group * call.m
    block_m = min(padded(rows), ROWS if skip is None else skip.rows)
    programs = call.batch * (call.heads // call.group) * -(-rows // block_m)
    key_tiles = -(-call.n // chosen.block_n)
    if skip is not None and skip.chunk is not None:
        splits = -(-call.n // skip.chunk)
    splits = splits or min(chosen.splits, key_tiles) or split_count(programs, key_tiles, multiprocessors(q.device))
    total = call.batch * call.heads * call.m
    partial = q.new_empty((splits, total, call.dv), dtype=torch.float32)
    stats = q.new_empty((2, splits, total), dtype=torch.float32)
    loads, ints, *numbers = call.scalars
    arguments: Sequence[Any] = (loads, ints, *numbers, splits, total)
    if call.switches["WEIGHT"] is not None:
        raise ValueError("the split-KV kernels take no factor of the probabilities; flash_forward does")
    switches = {name: value for name, value in call.switches.items() if name != "WEIGHT"} | {
        "BLOCK_N": chosen.block_n, "STAGES": chosen.num_stages, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages,
    }  # fmt: skip
    skipped = skips.limit(skip, call.n), 0 if skip is None else skip.chunk
    r = residuals
    with call.device:
        run(
            decode_partial, (programs * splits,), q, k, v, partial, stats, call.seed, q.stride(), k.stride(), v.stride(),
            *arguments, *skipped, KV_RANGE=program.kv_range, EVEN_N=call.n % chosen.block_n == 0, **switches | {"BLOCK_M": block_m},
        )  # fmt: skip
        run(
            decode_merge, (total,), q, k, v, partial, stats, out, r.lse, r.row_max, r.row_sum, r.degenerate, call.seed,
            q.stride(), k.stride(), v.stride(), out.stride(), *arguments, FLOOR=program.floor, CEILING=program.ceiling,
            EMPTY_ZERO=program.empty_zero, BLOCK_S=MERGED, **switches | {"BLOCK_M": 16},
        )  # fmt: skip
