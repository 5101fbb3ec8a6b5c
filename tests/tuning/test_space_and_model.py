"""Which configurations are looked at, in which order, and which are not because they cannot fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attnfx.lowering import crosscompile
from attnfx.lowering.configs import KERNELS, SHARED_LIMIT, Config, Tile, default, listed
from attnfx.lowering.tuning import lookup, model, space
from attnfx.lowering.tuning.shapes import Shape, bucket

LONG = Shape(2, 8, 4, 4096, 4096, 64, 64, torch.bfloat16)
SWIN = Shape(1024, 6, 6, 49, 49, 32, 32, torch.bfloat16)

# kernel, head_dim, block_m, block_n, warps, stages, descriptors: registers, spilled bytes, shared bytes, as `crosscompile` finds
# them for bfloat16 under a causal mask on sm90
COMPILED = [
    ("forward", 64, 64, 64, 4, 2, True, 127, 0, 41_984),
    ("forward", 64, 64, 32, 4, 2, True, 82, 0, 24_608),
    ("forward", 128, 64, 64, 4, 3, True, 159, 0, 115_712),
    ("forward", 128, 128, 64, 8, 3, False, 239, 0, 131_072),
    ("forward", 256, 128, 32, 8, 2, True, 209, 0, 131_104),
    ("query_gradient", 64, 128, 128, 8, 2, True, 250, 0, 99_328),
    ("query_gradient", 128, 64, 128, 4, 2, True, 255, 8, 164_864),
    ("query_gradient", 128, 128, 64, 8, 3, True, 218, 0, 164_864),
    ("query_gradient", 128, 128, 64, 4, 2, True, 255, 360, 131_104),
    ("key_gradient", 64, 64, 64, 4, 2, False, 255, 104, 50_176),
    ("key_gradient", 128, 32, 64, 4, 2, True, 249, 0, 65_808),
    ("key_gradient", 128, 64, 64, 4, 3, True, 255, 128, 133_120),
    ("key_gradient", 128, 128, 64, 8, 3, True, 255, 392, 232_448),
    ("key_gradient", 128, 128, 64, 4, 2, True, 255, 872, 165_888),
    ("key_gradient", 128, 64, 128, 4, 2, True, 255, 1120, 131_600),
]


def _shape(head_dim: int, **changes: Any) -> Shape:
    return replace(LONG, head_dim=head_dim, value_dim=head_dim, **changes)


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4), (49, 64), (64, 64), (65, 128), (8192, 8192)])
def test_sizes_fall_into_buckets(size: int, expected: int) -> None:
    assert bucket(size) == expected


def test_a_key_says_what_a_call_is_and_no_more() -> None:
    key = LONG.key("program", "forward")
    assert key == "program forward bfloat16 d64 dv64 m4096 n4096 bh16 group2"
    same = (
        replace(LONG, queries=2049, keys=3000),
        replace(LONG, batch=1, heads=16, key_heads=8),
        replace(LONG, batch=1, heads=10, key_heads=5),
    )
    assert {s.key("program", "forward") for s in same} == {key}
    other = (
        replace(LONG, queries=4097), replace(LONG, keys=2048), replace(LONG, batch=4), replace(LONG, key_heads=8),
        replace(LONG, dtype=torch.float16), replace(LONG, value_dim=32), replace(LONG, lists=True), replace(LONG, dropout=True),
        replace(LONG, dense=False),
    )  # fmt: skip
    keys = {s.key("program", "forward") for s in other} | {LONG.key("another", "forward"), LONG.key("program", "key_gradient")}
    assert len(keys) == len(other) + 2
    assert key not in keys


def test_a_shape_is_that_of_its_tensors() -> None:
    q, k, v = torch.empty(2, 6, 5, 16), torch.empty(2, 3, 7, 16), torch.empty(2, 3, 7, 24)
    assert Shape.of(q, k, v, True) == Shape(2, 6, 3, 5, 7, 16, 24, torch.float32, lists=True)
    assert not Shape.of(q, k, v.transpose(2, 3).contiguous().transpose(2, 3)).dense


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_grid_holds_what_a_kernel_takes(kernel: Any, dtype: torch.dtype) -> None:
    start = default(kernel, dtype, 64, 64, "sm90")
    for shape in (replace(LONG, dtype=dtype), replace(SWIN, dtype=dtype), replace(LONG, dtype=dtype, lists=True)):
        grid = space.coarse(kernel, shape, start)
        assert len(grid) == len(set(grid)) > 2
        assert start not in grid
        for choice in grid:
            assert isinstance(choice, Config)
            assert choice.block_m <= max(bucket(shape.queries), 16)
            assert choice.block_n <= max(bucket(shape.keys), 16)
            assert kernel != "diagonal_bias" or choice.block_m == choice.block_n
            assert not shape.lists or choice == listed(kernel, choice)


def test_windows_of_images_get_small_tiles_and_few_warps() -> None:
    start = default("forward", torch.bfloat16, 32, 32, "sm90")
    small = space.coarse("forward", SWIN, start)
    assert {1, 2} <= {c.num_warps for c in small}
    assert max(max(c.block_m, c.block_n) for c in small if isinstance(c, Config)) == 64
    assert {c.num_warps for c in space.coarse("forward", LONG, start)} == {4, 8}


def test_neighbours_differ_in_one_field_and_are_new() -> None:
    leader, other = Config(64, 64, 4, 2), Config(128, 64, 8, 2)
    found = space.near("forward", LONG, "sm90", [leader, other], [leader, other, replace(leader, num_stages=3)])
    assert replace(leader, num_stages=4) == found[1]
    assert replace(leader, tma=False) in found
    assert not {leader, other, replace(leader, num_stages=3)} & set(found)
    assert all(c.block_m in (64, 128) and c.block_n == 64 for c in found if isinstance(c, Config))
    for unread in (("forward", SWIN, "sm90"), ("forward", LONG, "sm80"), ("tile_bias", LONG, "sm90")):
        assert all(c.tma for c in space.near(*unread, [leader], [leader]) if isinstance(c, Config))


def test_splits_are_searched_for_beside_the_tile() -> None:
    shape, start = replace(LONG, queries=1), Tile(64, 4, 3, 8)
    grid = space.coarse(space.DECODE, shape, start)
    assert {c.splits for c in grid if isinstance(c, Tile)} == {4, 8, 16}
    assert Tile(64, 4, 3, 12) in space.near(space.DECODE, shape, "sm90", [start], [start])
    few = space.coarse(space.DECODE, replace(shape, keys=300), Tile(64, 4, 3, 4))
    assert all(c.splits <= -(-300 // c.block_n) for c in few if isinstance(c, Tile))  # no split is empty


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: " ".join(map(str, row[:6])))
def test_shared_memory_is_what_the_compiler_takes(row: Any) -> None:
    kernel, head_dim, *config, registers, spills, shared = row
    found = model.estimate(kernel, Config(*config), _shape(head_dim), "sm90", 132)
    assert found.least <= shared
    assert found.shared == pytest.approx(shared, rel=0.05)
    # what holds more accumulators than there are registers spills; what spills nothing is never pruned
    pruned = model.objection(kernel, Config(*config), _shape(head_dim), "sm90", 132)
    assert pruned is None or spills > 300
    assert registers == 255 or found.accumulators < registers


@pytest.mark.parametrize("row", [COMPILED[0], COMPILED[9]], ids=lambda row: row[0])
def test_the_numbers_are_those_of_the_compiler(row: Any) -> None:
    kernel, head_dim, *config, registers, spills, shared = row
    with lookup.forced({kernel: Config(*config)}):
        (found,) = crosscompile.compile_job(crosscompile.Job("causal", torch.bfloat16, head_dim, "sm90", (kernel,)))
    assert found.shared == pytest.approx(shared, rel=0.05)
    assert found.registers == pytest.approx(registers, rel=0.2)
    assert (found.spills > 0) == (spills > 0)


@pytest.mark.parametrize("target", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_shipped_configuration_is_pruned(target: str, dtype: torch.dtype) -> None:
    for kernel in KERNELS:
        for width in (32, 64, 128, 256):
            shape = _shape(width, dtype=dtype)
            assert model.objection(kernel, default(kernel, dtype, width, width, target), shape, target, 100) is None


def test_what_cannot_fit_is_pruned_with_its_numbers() -> None:
    large = model.objection("forward", Config(128, 128, 8, 4), _shape(256), "sm90", 132)
    assert large is not None
    assert "bytes of tiles in shared memory; sm90 has 232448" in large
    many = model.objection("key_gradient", Config(64, 128, 4, 2), _shape(128), "sm90", 132)
    assert many == "416 registers a thread of accumulators; there are 255"
    assert model.objection("forward", Config(128, 64, 4, 4), _shape(128), "gfx942", 304) is not None


def test_a_grid_that_fills_the_device_is_preferred() -> None:
    few = replace(LONG, batch=1, heads=2, key_heads=2, queries=2048)
    large, small = (model.estimate("forward", Config(m, 64, 4, 2), few, "sm90", 132) for m in (128, 64))
    assert max(large.waves, small.waves) < 1
    assert small.cost < large.cost
    large, small = (model.estimate("forward", Config(m, 64, 4, 2), LONG, "sm90", 132) for m in (64, 32))
    assert large.cost < small.cost
