"""Processes that compile: what they leave in Triton's cache is what a launch looks for, and a failure is an answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from tuning_calls import backward_call, forward_call

from attnfx.lowering.configs import Config, Tile
from attnfx.lowering.tuning import compilers, worker
from attnfx.lowering.tuning.compilers import Compiled, Compilers
from attnfx.lowering.tuning.entries import choice_to_data
from attnfx.lowering.tuning.operands import Operands

TARGET = ("sm90", "cuda", 90, 32)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Compiling for a GPU that is not here, with a cache of the test's own; afterwards as before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", worker.Driver(GPUTarget(*TARGET[1:])))
    return tmp_path


def _job(call: Operands, kernel: str, cache: Path) -> dict[str, Any]:
    # through text, as it travels
    return json.loads(json.dumps({"operands": call.to_data(), "kernel": kernel, "target": TARGET, "cache": str(cache)}))


def _long(**changes: Any) -> Operands:
    return forward_call("alibi", torch.bfloat16, **{"queries": 512, "keys": 512, "head_dim": 64, "value_dim": 64, **changes})


@pytest.mark.parametrize(
    ("call", "kernel", "choice"),
    [
        (lambda: _long(), "forward", Config(64, 32, 4, 2)),
        (lambda: backward_call(_long()), "key_gradient", Config(32, 64, 4, 2, tma=False)),
        (lambda: backward_call(forward_call("tile", torch.bfloat16)), "tile_bias", Config(32, 32, 4, 1)),
        (lambda: forward_call("window", torch.bfloat16, queries=1, keys=600), "decode", Tile(32, 4, 2, 5)),
        (lambda: forward_call("documents", torch.bfloat16, queries=1024, keys=1024), "forward", Config(64, 32, 4, 2)),
    ],
    ids=["forward", "key_gradient", "tile_bias", "decode", "by lists"],
)
def test_a_launch_finds_what_a_worker_compiled(elsewhere: Path, call: Any, kernel: str, choice: Any) -> None:
    made = call()
    answer = worker.compiled(_job(made, kernel, elsewhere) | {"config": choice_to_data(choice)})
    assert "error" not in answer, answer
    assert 0 < answer["registers"] <= 255
    assert answer["shared"] >= 0
    before, own = made.calls(kernel, choice, "sm90")
    assert [c.kernel.__name__ for c in before] == (["flash_delta"] if kernel in ("key_gradient", "tile_bias") else [])
    assert len(own) == (2 if kernel == "decode" else 1)
    # real tensors now; a warmup is a launch up to the moment of launching
    hashes = [c.kernel.run(*c.arguments, grid=c.grid, warmup=True, **c.keywords).hash for c in own]
    assert hashes == answer["hashes"]


def test_a_call_of_meta_tensors_is_recorded_like_the_real_one() -> None:
    real = backward_call(forward_call("tile", torch.bfloat16))
    meta = Operands.from_data(json.loads(json.dumps(real.to_data())))
    assert meta.q.is_meta
    assert meta.kernels("sm90") == real.kernels("sm90")
    assert list(meta.kernels("sm90")) == ["query_gradient", "key_gradient", "tile_bias"]
    assert [meta.key(k) for k in meta.kernels("sm90")] == [real.key(k) for k in real.kernels("sm90")]
    with pytest.raises(ValueError, match="no kernel 'decode'"):
        real.calls("decode", Tile(32, 4, 2), "sm90")


def test_kernels_that_walk_lists_have_entries_of_their_own() -> None:
    call = forward_call("documents", torch.bfloat16, queries=1024, keys=1024)
    assert call.row_blocks is not None
    assert call.key("forward").endswith(" lists")
    decode = forward_call("documents", torch.bfloat16, queries=4, keys=1024)
    assert list(decode.kernels("sm90")) == ["decode"]
    assert not decode.key("decode").endswith(" lists")


def test_workers_answer_side_by_side_and_errors_are_answers(tmp_path: Path) -> None:
    pool = Compilers(2)
    try:
        job = _job(_long(), "forward", tmp_path)
        choices = [Config(64, 32, 4, 2), Config(48, 32, 4, 2), Config(32, 32, 4, 1)]
        found = dict(pool.compile(job, choices, 300.0))
        assert list(found) == choices
        assert "block_m is 48" in found[choices[1]].error
        for choice in (choices[0], choices[2]):
            assert not found[choice].error
            assert found[choice].registers > 0
        assert len(pool._running) <= 2
        assert list(tmp_path.rglob("*.cubin"))  # in the cache that the job names
        assert [c.error for c in dict(pool.compile({**job, "kernel": "none"}, choices[:1], 300.0)).values()] != [""]
    finally:
        pool.close()
    assert pool._running == []


def test_what_is_not_compiled_in_time_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pool = Compilers(1)
    try:
        start = time.monotonic()
        found = list(pool.compile(_job(_long(), "forward", tmp_path), [Config(64, 32, 4, 2), Config(64, 64, 4, 2)], 0.2))
        assert found == []
        assert time.monotonic() - start < 20  # no worker even starts that fast
    finally:
        pool.close()


class _Ended:
    """A worker that ends before it answers."""

    def __init__(self) -> None:
        self.stdin = self
        self.stdout = self

    def poll(self) -> None:
        return None

    def write(self, text: str) -> None:
        raise BrokenPipeError

    def readline(self) -> str:
        return ""

    flush = kill = wait = poll


def test_a_worker_that_ends_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.subprocess, "Popen", lambda *args, **keywords: _Ended())
    pool = Compilers(1)
    try:
        ((_, found),) = pool.compile({}, [Config(64, 64, 4, 2)], 10.0)
        assert found == Compiled(error="the compiling process ended before it answered")
    finally:
        pool.close()


def test_the_shared_pool_ends_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "IDLE", 0.05)
    shared = compilers._Shared()
    first = shared.get()
    assert shared.get() is first
    shared.rest()
    for _ in range(100):
        if shared.pool is None:
            break
        time.sleep(0.05)
    assert shared.pool is None
    assert shared.get() is not first
    shared.end()
