"""What a configuration needs of a multiprocessor, by arithmetic: what cannot fit is never compiled, what promises most is first.

Counted are the tiles that a kernel holds: accumulators in registers, tiles of queries, keys and values in shared memory for each
stage of the pipeline. Where Hopper's matrix instructions read both operands from shared memory (`_from_shared`) it is what the
compiler takes, up to a few per cent; elsewhere it is a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnfx.lowering.configs import SHARED_LIMIT, Choice, Tile, padded
from attnfx.lowering.decode import ROWS
from attnfx.lowering.tuning.shapes import Shape

REGISTERS = 255
#: Registers, threads and programs that one multiprocessor holds, and registers of a thread that hold no tile.
FILE, THREADS, PROGRAMS, OTHER = 65_536, 2048, 32, 40
#: Scores whose time the bookkeeping of one tile takes, and bytes read whose time one score takes.
TILE_SCORES, SCORE_BYTES = 1024.0, 24.0
#: Bytes a thread from which on what the compiler spilled is not even timed.
SPILLED = 2048


@dataclass(frozen=True)
class Estimate:
    """``accumulators``: registers a thread of tiles in float32 and of what is made from them; ``least`` and ``shared``: bytes of
    shared memory, at least and probably; ``resident``: programs that share a multiprocessor; ``waves``: how often the device is
    filled; ``cost``: time, in no unit, to compare configurations of one kernel by."""

    accumulators: int
    least: int
    shared: int
    resident: int
    waves: float
    cost: float


@dataclass(frozen=True)
class _Tiles:
    """Elements: accumulators, rounded copies of them, tiles that stay, tiles that are streamed; rows of the first operand."""

    wide: int
    rounded: int
    kept: int
    streamed: int
    rows: int


def estimate(kernel: str, choice: Choice, shape: Shape, target: str, multiprocessors: int) -> Estimate:
    """Of a kernel ("decode", or a `configs.Kernel`) in one configuration, for calls like ``shape``."""
    tiles, size = _tiles(kernel, choice, shape), shape.dtype.itemsize
    lanes = 64 if target.startswith("gfx") else 32
    threads = choice.num_warps * lanes
    accumulators = math.ceil((tiles.wide + tiles.rounded * size / 4) / threads)
    streamed, stages = tiles.streamed * size, max(choice.num_stages, 1)
    if _from_shared(tiles, choice, shape, target) and not kernel.endswith("bias"):
        least = shared = tiles.kept * size + streamed * stages
    else:
        least = streamed * (stages - 1)
        shared = max(least + tiles.kept * size // 2, tiles.kept * size)
    registers = min(REGISTERS, accumulators + OTHER)
    room = SHARED_LIMIT[target] // max(shared, 1)
    resident = max(1, min(FILE // (registers * threads), room, THREADS // threads, PROGRAMS))
    each = _programs(kernel, choice, shape) / multiprocessors
    cost = _cost(kernel, choice, shape, accumulators, resident, each)
    return Estimate(accumulators, least, shared, resident, each / resident, cost)


def objection(kernel: str, choice: Choice, shape: Shape, target: str, multiprocessors: int) -> str | None:
    """Why a configuration cannot fit; None where it may."""
    found, limit = estimate(kernel, choice, shape, target, multiprocessors), SHARED_LIMIT[target]
    if found.least > limit:
        return f"{found.least} bytes of tiles in shared memory; {target} has {limit} for a program"
    if found.accumulators > REGISTERS:
        return f"{found.accumulators} registers a thread of accumulators; there are {REGISTERS}"
    return None


def _tiles(kernel: str, choice: Choice, shape: Shape) -> _Tiles:
    d, dv, n = padded(shape.head_dim), padded(shape.value_dim), choice.block_n
    if isinstance(choice, Tile):
        m = min(padded(shape.group * shape.queries), ROWS)
        return _Tiles(m * dv + m * n, m * n, m * d, n * (d + dv), m)
    m = choice.block_m
    match kernel:
        case "forward":
            return _Tiles(m * dv + m * n, m * n, m * d, n * (d + dv), m)
        case "query_gradient":
            return _Tiles(m * d + 2 * m * n, m * n, m * (d + dv), n * (d + dv), m)
        case "key_gradient":
            return _Tiles(n * (d + dv) + 2 * m * n, m * n, n * (d + dv), m * (d + dv), n)
        case _:
            return _Tiles(2 * m * n, 0, m * (d + dv), n * (d + dv), m)


def _from_shared(tiles: _Tiles, choice: Choice, shape: Shape, target: str) -> bool:
    """Whether the matrix instructions of whole warp groups run, which take their operands from shared memory."""
    return target == "sm90" and shape.dtype != torch.float32 and tiles.rows >= 64 and choice.num_warps % 4 == 0


def _programs(kernel: str, choice: Choice, shape: Shape) -> int:
    if isinstance(choice, Tile):
        rows = shape.group * shape.queries
        return shape.batch * shape.key_heads * -(-rows // min(padded(rows), ROWS)) * max(choice.splits, 1)
    if kernel == "key_gradient":
        return shape.batch * shape.key_heads * -(-shape.keys // choice.block_n)
    return shape.batch * shape.heads * -(-shape.queries // choice.block_m)


def _cost(kernel: str, choice: Choice, shape: Shape, accumulators: int, resident: int, each: float) -> float:
    """``each``: programs for each multiprocessor, on average."""
    own, walked = (16, choice.block_n) if isinstance(choice, Tile) else (choice.block_m, choice.block_n)
    if kernel == "key_gradient":
        own, walked = walked, own
    read = (shape.head_dim + shape.value_dim) * shape.dtype.itemsize / own
    a_score = 1.0 + read / SCORE_BYTES + TILE_SCORES / (own * walked)
    # a program that nobody else computes beside waits for its memory; the busiest multiprocessor is the last one
    waiting = 1.0 + 1.0 / (resident * choice.num_warps * min(choice.num_stages, 3))
    tail = math.ceil(each) / each if each > 0 else 1.0
    spilled = 1.0 + max(0, accumulators + OTHER - REGISTERS) / REGISTERS
    return a_score * waiting * tail * spilled
