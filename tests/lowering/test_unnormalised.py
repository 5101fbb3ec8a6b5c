"""Exponentials that nothing divides: blocks and kernels against the reference, and what has no lowering."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreted import beyond
from interpreted import rows as rows_of
from lowering_sites import HEADS, Example, H, load, side, site
from sink_cases import plan_text
from unnormalised_cases import INTERPRETED, errors, examples, rows

from attnfx.lowering import vendor
from attnfx.lowering.plan import make_plan
from attnfx.site import AttentionSite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_the_blocks_are_the_reference(example: Example, dtype: torch.dtype) -> None:
    assert beyond(errors(example, "portable", dtype), 1e-11 if dtype == torch.float64 else 1e-5) == {}


@pytest.mark.interpreter
def test_the_kernels_are_the_reference_in_the_interpreter() -> None:
    found = rows_of(Path(__file__).parent / "unnormalised_cases.py")
    assert {row["name"] for row in found} == set(INTERPRETED)
    assert {row["name"]: over for row in found if (over := beyond(row["errors"], 3e-5))} == {}


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
