"""`attnfx tune`: what it does without a GPU, what it gives away and takes, and the benchmark's rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from attnfx import cli
from attnfx.commands import tune
from attnfx.errors import AttnfxError, UnknownOption
from attnfx.lowering.configs import Config
from attnfx.lowering.tuning import cache
from attnfx.lowering.tuning.entries import Entry
from attnfx.lowering.tuning.search import Outcome
from attnfx.lowering.tuning.shapes import Shape
from attnfx.options import Options
from benchmarks import tuning as benchmark

WHO = cache.Identity("NVIDIA H200", "2.11.0", "3.6.0", "0.1.0", "1a2b3c4d")
ENTRY = Entry(Config(64, 128, 4, 2), 0.5, 0.75)
SHAPE = Shape(2, 8, 4, 4096, 4096, 64, 64, torch.bfloat16)
FOUND = Outcome("forward", SHAPE, Config(64, 64, 4, 3), Config(128, 64, 8, 2), 2.0, 1.0, 30, {"a wrong result": 1}, 12.5)
FAILED = Outcome("key_gradient", SHAPE, FOUND.start, FOUND.start, float("nan"), float("nan"), 0, {}, 0.5, "it is wrong")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU that is not here, and models beside the test."""
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "here", lambda: WHO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tune_models", raising=False)
    (tmp_path / "tune_models.py").write_text("def pair(): return len, (1, 2)\n")


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["tune", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("arguments", [["any:thing"], ["--export", "f.json"], ["--import", "f.json"]])
def test_without_a_gpu_it_says_what_was_found_and_what_is_needed(arguments: list[str]) -> None:
    result = _run(*arguments)
    assert isinstance(result.exception, AttnfxError)
    assert "There is no GPU here: torch" in str(result.exception)
    assert "found a CPU with" in str(result.exception)
    assert "needs a CUDA or ROCm device" in str(result.exception)


def test_something_must_be_asked_for() -> None:
    result = _run()
    assert result.exit_code == 2
    assert "Name a model to tune" in result.output


def test_help_names_every_option() -> None:
    result = _run("--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for option in ("--budget", "--backward", "--again", "--export", "--import", "--force", "--json", "--policy"):
        assert option in text


def test_a_table_or_json_of_what_was_found(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tuned(model: Any, args: Any, kwargs: Any, settings: tune.Settings, tell: Any) -> tune.Tuned:
        asked.append((model, args, kwargs, settings))
        return tune.Tuned((FOUND, FAILED), 3, Path("tuned.json"))

    monkeypatch.setattr(tune, "tune", tuned)
    shown = _run("tune_models:pair", "--budget", "5", "--backward")
    assert shown.exit_code == 0, shown.output
    assert asked == [(len, (1, 2), {}, tune.Settings(5.0, True))]
    assert "NVIDIA H200" in shown.output
    row = json.loads(_run("tune_models:pair", "--json").stdout)
    assert row["remembered"] == 3
    assert row["kernels"][0]["best"]["block_m"] == 128
    assert (row["kernels"][0]["gain"], row["kernels"][1]["start_ms"]) == (2.0, None)


def test_nothing_to_search_for_says_why(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for remembered, why in ((0, "no kernel ran on a GPU"), (2, "2 kernels are remembered; --again searches anew")):
        monkeypatch.setattr(tune, "tune", lambda *args, n=remembered: tune.Tuned((), n, Path("f")))
        assert why in _run("tune_models:pair").output


def test_a_table_has_a_line_for_each_kernel() -> None:
    made = tune.Tuned((FOUND, FAILED), 0, Path("f")).table()
    cells = [list(column.cells) for column in made.columns]
    assert [c[0] for c in cells[:5]] == ["forward", "bfloat16 B=2 H=8/4 M=4096 N=4096 D=64", "2.000", "1.000", "2.00x"]
    assert cells[5] == ["block_m=128 block_n=64 num_warps=8 num_stages=2 tma=True", "it is wrong"]


def test_export_and_import(device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = _run("--export", "given.json")
    assert "there is nothing to export" in str(empty.exception)
    cache.add(WHO, {"key": ENTRY})
    assert "1 entries written to given.json" in _run("--export", "given.json").output
    assert "cannot be written" in str(_run("--export", "no/such/folder.json").exception)
    other = cache.Identity(**{**vars(WHO), "device": "NVIDIA H100"})
    monkeypatch.setattr(tune, "here", lambda: other)
    assert "--force imports it all the same" in str(_run("--import", "given.json").exception)
    assert "1 new entries from given.json" in _run("--import", "given.json", "--force").output
    assert cache.load(other) == {"key": ENTRY}
    assert "0 new entries" in _run("--import", "given.json", "--force").output


def test_the_option_and_the_modes_that_search() -> None:
    assert not Options.parse().searches
    assert Options.parse("max-autotune").searches
    assert Options.parse("max-autotune-no-cudagraphs").searches
    assert not Options.parse("reduce-overhead").searches
    assert not Options.parse("max-autotune", {"tune": "off"}).searches
    assert Options.parse(None, {"tune": "search"}).searches
    with pytest.raises(UnknownOption, match=r'"tune" is "?\'searched\'.*"off", "search"\. Did you mean "search"'):
        Options.parse(None, {"tune": "searched"})


@pytest.mark.parametrize("row", benchmark.ROWS, ids=lambda row: row.name)
def test_a_benchmark_row_is_a_call_of_the_kernels(row: benchmark.Row) -> None:
    _, call = benchmark.quick(row).call("meta")
    assert list(call.kernels("sm90")) == ["forward"]
    assert call.q.shape == (min(row.batch, 32), row.heads, min(row.length, 1024), row.width)


def test_a_benchmark_table_has_a_line_for_each_pass() -> None:
    found = {"forward": {"found": {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 2, "tma": True}}}
    good = {
        "row": "causal", "pass": "forward", "shipped_ms": 2.0, "tuned_ms": 1.0, "vendor_ms": None, "tuning_s": 9.0, "warm_s": 0.01,
        "timed": 30, "dropped": {"a wrong result": 2}, "found": found,
    }  # fmt: skip
    text = benchmark.table([good, {"row": "causal", "pass": "backward", "error": "RuntimeError: no"}])
    assert "2.00x" in text
    assert "forward 64.128.4.2.1" in text
    assert "failed: RuntimeError: no" in text
