"""Gradients of learned biases have the same bits in every run, and torch's deterministic algorithms are enough for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from determinism_cases import CASES, different, results

SCRIPT = Path(__file__).parent / "determinism_cases.py"


@pytest.mark.parametrize("name", CASES)
def test_blocks(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # what threads add up together may come in any order
    try:
        assert different(CASES[name], "portable", torch.device("cpu")) == []
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _lines() -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    paths = [str(SCRIPT.parent), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name: str) -> None:
    line = _lines()[name]
    assert "failure" not in line, line["failure"]
    assert line["different"] == []


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
