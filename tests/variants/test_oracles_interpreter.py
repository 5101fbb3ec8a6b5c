"""Every variant through the real kernels, run by Triton's interpreter in a subprocess (`oracle_script.py` says how)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnfx import variants

pytest.importorskip("triton")

HERE = Path(__file__).parent
pytestmark = pytest.mark.interpreter
NAMES = sorted(variants.all())
#: Variants that one process runs: each process takes seconds to begin.
TOGETHER = 6


@pytest.mark.parametrize("names", [NAMES[k : k + TOGETHER] for k in range(0, len(NAMES), TOGETHER)], ids=lambda names: names[0])
def test_kernels_give_what_the_oracles_give(names: list[str]) -> None:
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(HERE / "oracle_script.py"), "--few", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {name.partition("(")[0] for name in found} == set(names)
    far = {name: distances for name, distances in found.items() if not max(distances) < 1e-4}
    assert not far, far
