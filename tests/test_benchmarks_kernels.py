"""`benchmarks.kernels` without a GPU: its rows, its references, the hands of its peers, its table and its plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from benchmarks import biases, kernel_ahead, kernel_peers, kernel_plots, kernels, timing
from benchmarks.kernel_peers import Made
from benchmarks.kernel_rows import DOCUMENTS, LINEAR, ROWS, Row, quick
from benchmarks.kernel_table import speed, table
from benchmarks.kernel_truth import truth, wanted
from benchmarks.roofline import peak_tflops

BY_NAME = {row.name: row for row in ROWS}
FORMS = ("causal-d64-2k", "full-d64-2k", "window-8k", "documents-16k", "gqa-8k", "swin-49", "linear-d64-8k")


def _tiny(name: str) -> Row:
    row = quick(BY_NAME[name])
    return replace(row, length=min(row.length, 83))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MILLISECONDS", 1)
    monkeypatch.setattr(timing, "REPETITIONS", 1)


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", *arguments])
    _hurry(monkeypatch)
    return kernels.main()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("end", ["", "-backward"])
def test_all_peers_of_a_row_are_right(name: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)
    row = _tiny(name + end)
    results = {r["peer"]: r for r in kernels.run(row, "cpu")}
    assert list(results) == [*(["generated"] if row.form is not LINEAR else []), "chosen", "eager"]
    for r in results.values():
        assert "error" not in r, r
        assert 0 < r["distance"] < 1e-2
        assert r["ms"] > 0
        assert r["graph_ms"] is None
        assert ("tflops" in r) == (row.form is not LINEAR)
    assert ("layer_ms" in results["chosen"]) == (row.form is DOCUMENTS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_pairs_are_what_the_mask_keeps_and_every_softmax_has_a_kernel(row: Row) -> None:
    small = quick(row)
    at = torch.arange(small.length)
    q, _, _, *loads = small.inputs("cpu")
    keep = small.keep(at[:, None], at[None, :], *loads)
    if small.form is not LINEAR:
        assert small.form.pairs(small) == (small.length**2 if keep is None else int(keep.sum()))
        assert small.flops == int((2 + 5 * row.backward) * 2 * small.form.pairs(small) * small.batch * small.heads * small.width)
    if row.form.formula is not None and not (row.backward and row.form.learned):
        plan = kernel_peers.plan_of(small, q, tuple(loads), "cuda")
        assert plan.family == "flash"
        assert plan.masked == (keep is not None)
    if row.length >= 2048:
        assert row.length * row.batch == max(row.length, 16_384)


def test_a_reference_by_blocks_is_the_whole_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    row = quick(BY_NAME["gqa-8k-backward"])
    inputs = row.inputs("cpu")
    monkeypatch.setattr("benchmarks.kernel_truth.SCORES", 37 * row.batch * row.heads * row.length)
    found = truth(row, inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out, wide, found.push.double())
    assert wanted(row) == (0, 1, 2)
    for a, b in zip((found.out, *found.grads), (out, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("part", "backward"), [("output", False), ("dk", True)])
def test_wrong_numbers_are_not_timed(part: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = quick(BY_NAME["causal-d64-2k-backward" if backward else "causal-d64-2k"])

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return row.eager(q, k.detach() + 0 * k, v) if backward else 1.05 * row.eager(q, k, v)

    monkeypatch.setattr(kernels, "peers", lambda *given: iter([("generated", lambda: Made(wrong))]))
    (result,) = kernels.run(row, "cpu")
    assert result["error"].startswith(f"ArithmeticError: {part}: relative L2 distance")
    assert "ms" not in result


@pytest.mark.parametrize("name", ["causal-d64-2k", "window-8k", "documents-16k", "gqa-8k"])
def test_what_is_written_by_hand_for_flex_and_sdpa_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **how: call)
    row = quick(BY_NAME[name])
    inputs = row.inputs("cpu")
    right = truth(row, inputs)
    hands = dict(kernel_peers.peers(row, inputs, "cuda"))
    flex = hands["flex"]()
    assert right.distance(flex.attend(*inputs), ()) > 0
    assert (flex.setup is not None) == row.form.data
    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda backend: torch.no_grad())
    for vendor in ("cudnn", "flash", "efficient"):
        assert (vendor in hands) == (vendor in kernel_peers._backends(row))
        if vendor in hands:
            assert right.distance(hands[vendor]().attend(*inputs), ()) > 0


def test_the_command_writes_a_table_a_file_and_plots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "found.json"
    assert _run(monkeypatch, "--rows", "full-d64-[28]k", "--peers", "generated,eag*", "--out", str(out), "--plots") == 0
    said = capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    assert [(r["row"], r["peer"]) for r in results] == [
        (row, peer) for row in ("full-d64-2k", "full-d64-8k") for peer in ("generated", "eager")
    ]
    assert f"drawn to {out.with_suffix('.png')}" in said
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert list(kernel_plots.panels(results)) == [("full", 64)]
    assert _run(monkeypatch, "--rows", "swin-49", "--peers", "generated", "--out", str(out), "--plots") == 0
    assert "No plot was drawn: ValueError: no mask was measured at two lengths" in capsys.readouterr().out


def test_first_calls_are_those_of_the_processes_that_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [quick(BY_NAME[name]) for name in ("swin-49", "short-full-backward")]  # their processes find them by name
    took = kernel_ahead.first_calls(rows, "cpu", True, lambda peer, row: peer != "chosen", 1)
    assert set(took) == {("swin-49", "generated"), ("short-full-backward", "generated")}
    assert all(s > 0 for s in took.values())
    result = {"row": "swin-49", "peer": "generated", "first_s": 0.0}
    assert kernels.with_first_call(result, took)["first_s"] == took["swin-49", "generated"]
    assert kernels.with_first_call({**result, "peer": "eager"}, took)["first_s"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"), [(("--peers", "cudn"), "No peer is called cudn."), (("--rows", "x*"), "No row is called x*.")]
)
def test_what_is_not_there_is_named(
    arguments: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def test_peers_that_take_long_stand_aside_unless_they_are_asked_for() -> None:
    row = BY_NAME["full-d64-2k"]
    assert not kernels.asked("flex", row, None)
    assert kernels.asked("flex", row, ["fl*"])
    assert not kernels.asked("cudnn", row, ["fl*"])


def test_what_layers_share_is_a_difference_of_one_and_two() -> None:
    once = {"ms": 3.0, "graph_ms": None}
    made = Made(lambda: None, twice=lambda: None)  # type: ignore[arg-type,return-value]
    clock = pytest.MonkeyPatch()
    with clock.context() as patch:
        patch.setattr(kernels, "times", lambda step, device: {"ms": 4.4, "graph_ms": None})
        assert kernels.shared(made, made.twice, once, "cpu") == pytest.approx({"setup_ms": 1.6, "layer_ms": 1.4 + 1.6 / 32})
    assert kernels.shared(Made(lambda: None), None, once, "cpu") == {}  # type: ignore[arg-type,return-value]


def test_short_calls_are_compared_by_their_graphs() -> None:
    slow, fast = {"ms": 0.9, "graph_ms": 0.2}, {"ms": 0.8, "graph_ms": 0.1}
    assert timing.ratio(slow, fast) == 2.0
    assert timing.ratio(slow, {"ms": 0.6, "graph_ms": None}) == 1.5
    assert timing.ratio({"ms": 4.0, "graph_ms": 9.0}, {"ms": 2.0, "graph_ms": 1.0}) == 2.0
    assert speed({**slow, "layer_ms": 3.0}, {**fast, "layer_ms": 1.0}) == 3.0


def test_a_table_has_a_line_for_each_peer() -> None:
    good = {"row": "causal", "peer": "generated", "ms": 2.0, "graph_ms": 1.9, "peak_mib": 5.0, "first_s": 1.0, "distance": 1e-3}
    flex = {**good, "peer": "flex", "ms": 3.0, "graph_ms": None, "tflops": 494.5, "of_peak": 0.5, "setup_ms": 3.2, "layer_ms": 3.1}
    text = table([good, flex, {"row": "causal", "peer": "flash", "error": "RuntimeError: no"}], {"causal": {"flex": 1.2}})
    assert "failed: RuntimeError: no" in text
    (line,) = [line.split() for line in text.splitlines() if " flex " in line]
    assert line == ["causal", "flex", "3.000", "-", "3.200", "3.100", "494", "50%", "5", "1.0", "1.50x", "1.2x", "1.0e-03"]


def test_the_table_of_biases_has_the_graphs_times() -> None:
    ours = {"row": "table", "peer": "attnfx", "ms": 0.9, "graph_ms": 0.2, "peak_mib": 1.0, "distance": 1e-3}
    text = biases.table([ours, {**ours, "peer": "flex", "graph_ms": 0.5}, {"row": "table", "peer": "sdpa", "error": "no"}])
    assert next(line.split() for line in text.splitlines() if " flex " in line)[2:6] == ["0.900", "0.500", "2.50x", "2.2x"]


def test_shares_are_of_devices_that_are_known() -> None:
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA GeForce RTX 4090") is None
