"""Calls made again from their tapes compute what the portable blocks compute on the tensors of that call."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from replay_script import NAMES

SCRIPT = Path(__file__).parent / "replay_script.py"
TOLERANCE = 3e-5

pytestmark = [pytest.mark.interpreter]


@lru_cache(maxsize=1)
def _lines() -> dict[str, dict[str, object]]:
    pytest.importorskip("triton")
    root = str(SCRIPT.parent.parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", [*NAMES, "linear"])
def test_calls_made_again_agree_with_blocks(name: str) -> None:
    line = _lines()[name]
    assert "failure" not in line, line["failure"]
    errors = line["errors"]
    assert isinstance(errors, dict)
    assert {k: v for k, v in errors.items() if not v <= TOLERANCE} == {}
