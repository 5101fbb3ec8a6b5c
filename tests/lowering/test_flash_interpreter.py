"""The flash kernels, run by Triton's interpreter in a subprocess, against float64.

A subprocess, since TRITON_INTERPRET must be set before any kernel is imported, and would spoil other tests' kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# chosen by the start of their names; together they hold every case
GROUPS = ("plain", "layout", "softcap", "causal", "window", "padding", "padded", "alibi", "tile", "column", "diagonal",
          "dropout", "weight", "short", "empty")  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("group", GROUPS)
def test_flash_in_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(HERE / "flash_script.py"), group]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"no case starts with {group!r}"
    assert [row for row in rows if "failure" in row] == []
    over = {row["case"]: {k: e for k, e in row["errors"].items() if not e <= 1} for row in rows}
    assert {case: errors for case, errors in over.items() if errors} == {}
