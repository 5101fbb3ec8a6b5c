"""Inductor's caches: a second process finds the compiled graph of the first, attention and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "cached_compile.py"


def counters(cache: Path) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = counters(tmp_path), counters(tmp_path)
    assert first["autograd_cache_saved"] == 1
    assert first["fxgraph_cache_miss"] == 2
    assert (second["autograd_cache_hit"], second["fxgraph_cache_hit"], second["fxgraph_cache_miss"]) == (1, 2, 0)
    assert first.get("autograd_cache_bypass", 0) == second.get("autograd_cache_bypass", 0) == 0
    assert max(first["error"], second["error"]) < 1e-5
