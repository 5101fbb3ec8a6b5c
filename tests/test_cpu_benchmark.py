"""`benchmarks.cpu` measures what it says: right results pass, wrong ones are errors, slower rows are named."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cpu, cpu_variants, timing
from benchmarks.cpu import HEADS, ROWS, Row, distance, run, slower, stepping, table, truth, turns
from benchmarks.cpu_variants import distance as distance_of_variant


@pytest.mark.parametrize("attend", sorted({row.attend for row in ROWS}, key=lambda f: f.__name__))
def test_truth_is_the_spelling_of_all_heads_in_float64(attend: Any) -> None:
    row = Row(attend, torch.float64, 300, True)
    inputs = row.inputs()
    push = torch.randn(1, HEADS, 300, 64, dtype=torch.float64)
    right = truth(row, inputs, push)
    step = stepping(row, attend, inputs, push)
    assert len(right) == 4
    assert distance(step, right) < 1e-12
    right[3][..., 5] += 1.0
    assert distance(step, right) > 1e-3


def test_a_peer_that_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(call: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        return (lambda *given: 1.001 * call(*given)) if "backend" in options else call

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(cpu, "SECONDS", 0.0)
    results = {r["peer"]: r for r in run(Row(cpu.causal, torch.float32, 64, False), 2)}
    assert results["attnfx"]["error"].startswith("ArithmeticError: relative L2 distance 1.00e-03 from float64")
    assert results["compiled"]["turns"] == results["eager"]["turns"] == 2
    assert "failed: ArithmeticError" in table(list(results.values()))


def test_peers_take_turns_and_slow_ones_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    timed: list[str] = []
    monkeypatch.setattr(timing, "seconds", lambda call, device: (call(), timed.append(order[-1]))[0])
    monkeypatch.setattr(cpu, "SECONDS", 0.0)
    steps = {name: lambda name=name, s=s: (order.append(name), s)[1] for name, s in (("a", 0.1), ("b", 0.15), ("c", 9.0))}
    taken = turns(steps, 4)
    assert {name: len(times) for name, times in taken.items()} == {"a": 4, "b": 4, "c": 1}
    assert [name for name in timed if name != "c"] == list("ab" + "ba" + "ab" + "ab")
    # each but the first follows one of its own, where that is short
    assert [name for name in order if name != "c"] == list("ab" + "bbaa" + "aabb" + "aabb")


@pytest.mark.parametrize(("paired", "least", "named"), [(0.9, 0.9, ["r"]), (0.9, 1.0, ["r"]), (1.1, 0.9, ["r"]), (0.96, 0.97, [])])
def test_slower_is_slower_by_either_measure(paired: float, least: float, named: list[str]) -> None:
    ours = {"row": "r", "peer": "attnfx", "ms": 1.0, "least_ms": 1.0, "distance": 0.0}
    theirs = {"row": "r", "peer": "compiled", "ms": 1.0, "least_ms": least, "distance": 0.0, "paired": paired}
    assert slower([ours, theirs]) == named
    assert f"{paired:.2f}x" in table([ours, theirs])


def test_rows_have_names_of_their_own() -> None:
    assert not [a for a, b in itertools.combinations(ROWS, 2) if a.name == b.name]


def test_a_variant_is_measured_from_its_own_definition() -> None:
    row = cpu_variants.ROWS[0]
    dense = distance_of_variant(row, row.variants["window 512"], row.sdpa, 700)
    assert dense > 1e-2
    assert distance_of_variant(row, row.variants["window 512"], row.sdpa, 500) < 1e-5
