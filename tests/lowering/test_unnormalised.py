"""Exponentials that nothing divides: blocks and kernels against the reference, and what has no lowering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowering_sites import HEADS, Example, H, load, side, site
from sink_cases import plan_text
from unnormalised_cases import INTERPRETED, errors, examples, rows

from attnfx.lowering import vendor
from attnfx.lowering.plan import make_plan
from attnfx.site import AttentionSite

HERE = Path(__file__).parent


def beyond(found: dict[str, float], bound: float) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error <= bound}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_the_blocks_are_the_reference(example: Example, dtype: torch.dtype) -> None:
    assert beyond(errors(example, "portable", dtype), 1e-11 if dtype == torch.float64 else 1e-5) == {}


@pytest.mark.interpreter
def test_the_kernels_are_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(HERE / "unnormalised_cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(lines) == set(INTERPRETED), done.stderr[-2000:]
    assert {name: line["failure"] for name, line in lines.items() if "failure" in line} == {}
    assert {name: over for name, line in lines.items() if (over := beyond(line["errors"], 3e-5))} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_kernels_on_a_gpu_are_the_reference(example: Example) -> None:
    assert beyond(errors(example, "flash", torch.float32, "cuda"), 3e-5) == {}


def test_a_row_that_holds_nan_is_nan_in_all_results() -> None:
    s = site(normaliser="max", key_heads=4)
    q, k, v = (torch.randn(2, 4, n, 16) for n in (37, 53, 53))
    q[1, 2, 5] = float("nan")
    got = torch.ops.attnfx.attention_unnormalised(q, k, v, [], [], plan_text(s, "portable"))
    for a, b in zip(got, rows(s, q, k, v), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_torch_has_no_such_attention() -> None:
    assert vendor.objections(site()) == ()
    assert "divided by their sum" in " ".join(vendor.objections(site(normaliser="max")))


@pytest.mark.parametrize("s", [site(sink=load(0, H), side=(side(HEADS),)), site(empty_rows="zero")])
def test_a_sink_and_rows_of_zeros_are_refused(s: AttentionSite) -> None:
    found = make_plan(s.replace(normaliser="max"), "portable")
    assert isinstance(found, tuple)
    assert "a sink or rows of zeros" in found[0]
