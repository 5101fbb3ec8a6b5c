"""The generated Triton functions in Triton's interpreter compute what the portable blocks compute, dropout masks included."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from interpreter_script import chosen

SCRIPT = Path(__file__).parent / "interpreter_script.py"
TOLERANCE = 3e-5

pytestmark = [pytest.mark.interpreter]


@lru_cache(maxsize=1)
def _lines() -> dict[str, dict[str, object]]:
    pytest.importorskip("triton")
    root = str(SCRIPT.parent.parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", [e.name for e in chosen()])
def test_kernels_and_blocks_agree(name: str) -> None:
    line = _lines()[name]
    assert "failure" not in line, line["failure"]
    errors = line["errors"]
    assert isinstance(errors, dict)
    assert {k: v for k, v in errors.items() if not v <= TOLERANCE} == {}
