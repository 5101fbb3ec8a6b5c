"""What a launch looks up: the entry of its bucket, nothing without one, nothing while kernels are recorded for other devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.errors import TritonError
from tuning_calls import backward_call, example, forward_call

from attnfx.lowering import codegen, flash, handed, launch
from attnfx.lowering.configs import Config, Tile
from attnfx.lowering.tuning import cache, calls, lookup
from attnfx.lowering.tuning.entries import Comparison, Entry
from attnfx.lowering.tuning.shapes import Shape

CPU = torch.device("cpu")
WHO = cache.Identity("This CPU", "0", "0", "0", "0")
TUNED = Config(32, 16, 4, 1)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    lookup.forget()
    calls.forget()
    yield
    lookup.forget()
    calls.forget()


def _qkv(queries: int = 100, keys: int = 200, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(batch, 4, length, 16, dtype=dtype) for length in (queries, keys, keys))


def _tuned(*qkv: torch.Tensor, kernel: str = "forward", lists: bool = False, dropout: bool = False) -> Config | None:
    return lookup.tuned(kernel, "program", *qkv, lists, dropout)  # type: ignore[arg-type]


def _remember(monkeypatch: pytest.MonkeyPatch, entries: dict[str, Any]) -> None:
    monkeypatch.setattr(cache, "identity", lambda device: WHO)
    cache.add(WHO, entries)


def test_a_cpu_has_none_and_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "load", lambda who: pytest.fail("a file was read"))
    assert _tuned(*_qkv()) is None
    assert CPU in lookup._tables


def test_an_entry_serves_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    _remember(monkeypatch, {Shape.of(q, k, v).key("program", "forward"): Entry(TUNED, 1.0, 2.0)})
    for _ in range(2):  # by its name, and then by the memory of it
        assert _tuned(q, k, v) == TUNED
        assert _tuned(*_qkv(queries=128, keys=129)) == TUNED
        assert _tuned(*_qkv(queries=129)) is None
        assert _tuned(*_qkv(batch=3)) is None
        assert _tuned(*_qkv(dtype=torch.bfloat16)) is None
        assert _tuned(q, k, v, kernel="key_gradient") is None
        assert _tuned(q, k, v, lists=True) is None
        assert _tuned(q, k, v, dropout=True) is None
        assert _tuned(q.transpose(2, 3).contiguous().transpose(2, 3), k, v) is None
    assert lookup.tuned("forward", "", q, k, v, False, False) is None
    assert lookup.tuned_tile("program", q, k, v, False) is None


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    _remember(monkeypatch, {Shape.of(q, k, v).key("program", "forward"): Entry(TUNED, 1.0, 2.0)})
    read = []
    load = cache.load
    monkeypatch.setattr(cache, "load", lambda who: (read.append(who), load(who))[1])
    for _ in range(3):
        assert _tuned(q, k, v) == TUNED
        assert _tuned(*_qkv(queries=500)) is None
    assert read == [WHO]
    lookup.replace(CPU, {})
    assert _tuned(q, k, v) is None


def test_answers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    _remember(monkeypatch, {Shape.of(q, k, v).key("program", "forward"): Entry(TUNED, 1.0, 2.0)})
    monkeypatch.setattr(lookup, "REMEMBERED", 10)
    for keys in range(129, 160):
        assert _tuned(*_qkv(keys=keys)) == TUNED
        assert len(lookup._answers) <= 10


def test_a_comparison_or_another_kind_is_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    shape = Shape.of(q, k, v)
    entries = {shape.key("program", "forward"): Comparison(1.0, 2.0), shape.key("program", "decode"): Entry(TUNED, 1.0, 2.0)}
    _remember(monkeypatch, {**entries, shape.key("program", "key_gradient"): Entry(Tile(16, 4, 1), 1.0, 2.0)})
    assert _tuned(q, k, v) is None
    assert lookup.tuned_tile("program", q, k, v, False) is None
    assert _tuned(q, k, v, kernel="key_gradient") is None


def test_a_launch_takes_it_and_a_recording_for_elsewhere_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    call = forward_call("alibi", head_dim=64, value_dim=64)
    _remember(monkeypatch, {call.key("forward"): Entry(TUNED, 1.0, 2.0)})
    seen: list[int] = []
    monkeypatch.setattr(flash, "run", lambda kernel, grid, *a, BLOCK_M, **k: seen.append(BLOCK_M))
    tensors = handed.pointers(call.plan, call.k.shape[2], call.loads)
    numbers = handed.ints(call.plan, call.plan.values((), call.k.shape[2], call.loads), tensors)
    given = call.program, call.q, call.k, call.v, tensors, numbers
    flash.forward(*given)
    flash.forward(*given, config=Config(16, 16, 4, 1))
    with lookup.forced({}):
        flash.forward(*given)
    with launch.recording("sm90"):
        flash.forward(*given)
    assert seen == [32, 16, 64, 64]


def test_a_retry_takes_shipped_configurations_and_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    attempts: list[Config | None] = []

    def attempt() -> str:
        attempts.append(_tuned(q, k, v))
        if attempts[-1] is not None:
            raise TritonError("out of resource")
        return "done"

    _remember(monkeypatch, {Shape.of(q, k, v).key("program", "forward"): Entry(TUNED, 1.0, 2.0)})
    assert lookup.safely(attempt) == "done"
    assert attempts == [TUNED, None]
    lookup.replace(CPU, {})
    for error in (TritonError("broken"), ValueError("wrong")):
        count: list[int] = []

        def failing(error: Exception = error, count: list[int] = count) -> None:
            count.append(1)
            raise error

        with pytest.raises(type(error)):
            lookup.safely(failing)
        assert count == [1]


def test_programs_that_mean_another_thing_have_another_key() -> None:
    keys = {forward_call(name).program.key for name in ("alibi", "window", "tile", "column")}
    assert len(keys) == 4
    one = example("alibi").site
    sizes = forward_call("alibi", queries=40, keys=56).program.key  # causal by as many keys more
    assert sizes == forward_call("alibi").program.key
    assert "" not in keys
    from attnfx.lowering.plan import make_plan

    changed = [one.replace(fill=-1e4, empty_rows="fill"), one.replace(fill=-1e4, empty_rows="fill", additive=True)]
    assert len({codegen.program(make_plan(s, "flash")).key for s in (one, *changed)}) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("made", [forward_call, lambda name: backward_call(forward_call(name))])
def test_nothing_is_searched_for_on_a_cpu(made: Any) -> None:
    call = made("alibi")
    calls.request(call.program.key)
    assert calls.requested(call.program.key)
    assert not calls.requested("another")
    calls.prepare(call)
    assert calls._done == set()
