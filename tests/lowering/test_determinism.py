"""Gradients of learned biases have the same bits in every run, and torch's deterministic algorithms are enough for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from determinism_cases import CASES, different, results
from interpreted import line


@pytest.mark.parametrize("name", CASES)
def test_blocks(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # what threads add up together may come in any order
    try:
        assert different(CASES[name], "portable", torch.device("cpu")) == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name: str) -> None:
    assert line(Path(__file__).parent / "determinism_cases.py", name)["different"] == []


def test_another_order_of_sums_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must be able to fail."""
    from attnfx.lowering import ops

    attend, calls = ops.attention_lse, iter(range(9))

    def shaken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(*args)
        return out * (1 + next(calls) * torch.finfo(out.dtype).eps), lse

    monkeypatch.setattr(ops, "attention_lse", shaken)
    assert "out" in different(CASES["slopes"], "portable", torch.device("cpu"))
    assert len(results(CASES["slopes"], "portable", torch.device("cpu"))) == 6
