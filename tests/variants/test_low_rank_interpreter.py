"""LowRankBias by the Triton kernels in Triton's interpreter: what the portable operations compute, and the definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BOUND = {"torch.float32": 2e-5, "torch.float16": 2e-3}


@pytest.mark.interpreter
def test_kernels_and_blocks_agree() -> None:
    pytest.importorskip("triton")
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(HERE / "low_rank_script.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 8
    assert [row for row in rows if row["by"] != ["flash", "portable"]] == []
    assert [row for row in rows if not max(*row["errors"], row["exact"]) <= BOUND[row["dtype"]]] == []
