"""Scripts that run the real Triton kernels on the CPU, in Triton's interpreter, and print JSON lines of what they found.

Each runs in a process of its own, since TRITON_INTERPRET must be set before any kernel is imported, and would spoil other
tests' kernels. A process takes seconds to begin, and so a script runs many cases.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def printed(script: Path, *arguments: str, quick: bool = True, **environment: str) -> str:
    """What a script prints; modules of its own folder, of this one and of the repository are found."""
    pytest.importorskip("triton")
    paths = [str(TESTS.parent), str(TESTS), environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **environment, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    through = [str(TESTS / "quick_interpreter.py")] if quick else []
    command = [sys.executable, "-W", "ignore", *through, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows(script: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """Its lines of JSON, one or more, none of which tells of a failure."""
    found = [json.loads(line) for line in printed(script, *arguments, **environment).splitlines() if line.startswith("{")]
    assert found, f"{script.name} printed nothing for {arguments}"
    assert [row for row in found if "failure" in row] == []
    return found


@cache
def lines(script: Path) -> dict[str, dict[str, Any]]:
    """What a script printed, failures among it, by the name of the case; it runs once."""
    found = [json.loads(line) for line in printed(script).splitlines() if line.startswith("{")]
    return {line["name"]: line for line in found}


def line(script: Path, name: str) -> dict[str, Any]:
    """What a script printed of a case that did not fail."""
    found = lines(script)[name]
    assert "failure" not in found, found["failure"]
    return found


def check(script: Path, name: str, tolerance: float) -> None:
    """The case ran, and none of its errors is larger than ``tolerance``, or NaN."""
    assert beyond(line(script, name)["errors"], tolerance) == {}


def beyond(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    """The errors that are larger, or NaN."""
    return {name: error for name, error in errors.items() if not error <= tolerance}
