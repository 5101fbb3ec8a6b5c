"""The first call takes at most 1.25 times what torch.compile's default takes on a two-layer model; explain of 32 layers, 5 s."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import attnfx
from attnfx import backend as pipeline
from tests.models import compare  # noqa: F401  (fails here, not in the subprocess, where transformers is missing)

ROUNDS, FACTOR = 2, 1.25  # the better of two: other work on the machine only ever adds time
ROOT = Path(__file__).resolve().parents[2]
FIRST_CALL = """
import sys, time, torch
import attnfx  # imported before the clock starts, as transformers and torch are
from tests.models.zoo import ZOO
model, kwargs = ZOO["llama-sdpa"].build()
torch.compile(lambda x: (x * 2).sum(-1))(torch.ones(8, 8))  # what only a process's first compile pays
start = time.perf_counter()
with torch.no_grad():
    torch.compile(model, backend=sys.argv[1])(**kwargs)
print("seconds", time.perf_counter() - start)
"""


def first_call(backend: str, cache: Path) -> float:
    """Seconds of the first call in a process of its own, with empty caches."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    command = [sys.executable, "-c", FIRST_CALL, backend]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("seconds")[-1])


def test_first_call(tmp_path: Path) -> None:
    taken: dict[str, list[float]] = {"inductor": [], "attnfx": []}
    for number in range(ROUNDS):
        for backend, times in taken.items():  # taking turns, so that a busy minute hits both
            times.append(first_call(backend, tmp_path / f"{backend}{number}"))
        ours, default = min(taken["attnfx"]), min(taken["inductor"])
        if ours <= FACTOR * default:
            return
    assert ours <= FACTOR * default, f"{ours:.1f} s, {ours / default:.2f} times torch.compile's default: {taken}"


def test_explain_of_32_layers_takes_five_seconds_beyond_dynamo_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=59
    )
    spent, rewrite = [], pipeline.rewrite

    def timed(*args: Any) -> Any:
        started = time.process_time()
        try:
            return rewrite(*args)
        finally:
            spent.append(time.process_time() - started)

    monkeypatch.setattr(pipeline, "rewrite", timed)
    counters.clear()
    with torch.no_grad():
        report = attnfx.explain(LlamaForCausalLM(config).eval(), torch.zeros(1, 45, dtype=torch.long), use_cache=False)
    assert len(report.sites) == 32
    assert sum(spent) < 5.0, "everything of attnfx's own, imports of the first use included"
    assert not counters["inductor"]
