"""Functions that Triton lacks, as the printer writes them, in Triton's interpreter against torch."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from functions_script import CLOSE, EXACT

SCRIPT = Path(__file__).parent / "functions_script.py"

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


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_a_printed_function_is_torchs(name: str) -> None:
    assert _lines()[name]["same"], _lines()[name]["why"]
