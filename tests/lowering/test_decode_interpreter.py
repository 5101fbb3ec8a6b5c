"""The split-KV kernels, run by Triton's interpreter in a subprocess, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# chosen by the start of their names; together they hold every case
GROUPS = (
    ("few plain", "few ahead", "few MHA", "few MQA", "few window"),
    ("few padding", "few of a long cache"),
    ("few sdpa", "few replaced", "few -", "few dropout"),
    ("plain", "layout", "window", "padded"),
    ("alibi", "diagonal", "tile"),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_decode_in_interpreter(group: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(HERE / "decode_script.py"), *group]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {part for part in group if not any(row["case"].startswith(part) for row in rows)} == set()
    assert [row for row in rows if "failure" in row] == []
    over = {row["case"]: {k: e for k, e in row["errors"].items() if not e <= 1} for row in rows}
    assert {case: errors for case, errors in over.items() if errors} == {}
