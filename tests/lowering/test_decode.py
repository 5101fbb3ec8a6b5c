"""When keys are split over programs, and over how many; that an ordinary call takes the split-KV kernels; what they compile to."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attnfx.lowering import launch
from attnfx.lowering.configs import SHARED_LIMIT
from attnfx.lowering.crosscompile import CAUSAL, TARGETS, Job, check
from attnfx.lowering.decode import SPLITS, serves, split_count, tile
from attnfx.lowering.flash import forward


@pytest.mark.parametrize(
    ("programs", "key_tiles", "expected"),
    [(8, 1000, 33), (8, 5, 5), (264, 100, 1), (5000, 100, 1), (1, 100_000, SPLITS), (132, 64, 2)],
)
def test_splits_fill_the_device(programs: int, key_tiles: int, expected: int) -> None:
    assert split_count(programs, key_tiles, multiprocessors=132) == expected


def launches(m: int, n: int, heads: int = 8, key_heads: int = 2) -> list[launch.Call]:
    q, k = (torch.empty(1, h, s, 64, dtype=torch.bfloat16, device="meta") for h, s in ((heads, m), (key_heads, n)))
    with launch.recording("sm90") as recording:
        forward(CAUSAL, q, k, k, (), (n - m,))
    return recording.calls


@pytest.mark.parametrize(("m", "n"), [(1, 256), (16, 4097), (1, 100_000)])
def test_few_queries_over_many_keys_are_split(m: int, n: int) -> None:
    partial, merge = launches(m, n)
    assert (partial.kernel.__name__, merge.kernel.__name__) == ("decode_partial", "decode_merge")
    assert partial.keywords["BLOCK_M"] == max(16, 4 * m)


@pytest.mark.parametrize(("m", "n"), [(17, 4096), (1, 255), (300, 300)])
def test_other_calls_are_not(m: int, n: int) -> None:
    assert not serves(m, n)
    assert [call.kernel.__name__ for call in launches(m, n)] == ["flash_forward"]


def test_growing_caches_compile_nothing_anew() -> None:
    """All that differs between two lengths are runtime numbers that are not specialised, and whether the last tile is whole."""
    constants = [[dict(call.keywords) for call in launches(1, n)] for n in (257, 511, 1001, 4095)]
    assert all(found == constants[0] for found in constants[1:])
    free = {"heads", "group", "M", "N", "splits", "total"}
    for call in launches(1, 257):
        assert {p.name for p in call.kernel.params if p.do_not_specialize} == free


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_size_has_a_tile(target: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim, value_dim in ((1, 256), (40, 64), (80, 128), (256, 1)):
            assert tile(dtype, head_dim, value_dim, target).block_n >= 16


@pytest.mark.parametrize("target", TARGETS)
def test_decode_compiles(target: str) -> None:
    job = Job("bias, finfo.min added", torch.bfloat16, 128, target, ("decode_partial", "decode_merge"))
    rows = check([target], [job], processes=1)
    assert [row.template for row in rows] == ["decode_partial", "decode_merge"]
    assert [row for row in rows if row.spills or not row.ok] == []
