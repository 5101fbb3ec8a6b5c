"""Scripts that run the real Triton kernels on the CPU, in Triton's interpreter, and print a line of JSON for each case."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@cache
def lines(script: Path) -> dict[str, dict[str, object]]:
    """What a script printed, by the name of the case; it runs once."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in found}


def check(script: Path, name: str, tolerance: float) -> None:
    """The case ran, and none of its errors is larger than ``tolerance``, or NaN."""
    line = lines(script)[name]
    assert "failure" not in line, line["failure"]
    errors = line["errors"]
    assert isinstance(errors, dict)
    assert {k: v for k, v in errors.items() if not v <= tolerance} == {}
