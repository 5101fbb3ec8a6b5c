"""Tiles that are left out by their scores: every tier against float64, what decides, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreted import beyond, check
from lowering_sites import Example, H, causal, inputs, load, side, site
from sink_cases import plan_text
from skip_cases import KEYS, QUERIES, SKIP, STEP, errors, examples, interpreted, operands, share, skipping

from attnfx.expr import ONE
from attnfx.lowering import skips, vendor
from attnfx.lowering.plan import make_plan
from attnfx.sites.skipping import Skip, left_out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_blocks_are_the_reference(example: Example, dtype: torch.dtype, tolerance: float) -> None:
    assert beyond(errors(example, "portable", dtype), tolerance) == {}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [e.name for e in interpreted()])
def test_kernels_are_the_reference(name: str) -> None:
    check(Path(__file__).parent / "skip_cases.py", name, tolerance=3e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_kernels_on_a_gpu_are_the_reference(example: Example, dtype: torch.dtype, tolerance: float) -> None:
    example = replace(example, site=example.site.replace(dtype=dtype))
    assert beyond(errors(example, "flash", dtype, "cuda"), tolerance) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "keys"), [(64, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize(("queries", "chunk"), [(700, None), (1, 1024)])
def test_the_tiles_of_real_sizes_on_a_gpu(rows: int, keys: int, queries: int, chunk: int | None) -> None:
    s = skipping(
        Skip(0.05, None, rows, keys, chunk), queries, 3000, keep=causal(3000 - queries), dtype=torch.bfloat16, head_dim=128
    )
    assert beyond(errors(Example("", s), "flash", torch.bfloat16, "cuda"), 2e-2) == {}


@pytest.mark.parametrize("name", ["causal", "full", "by the length", "step", "step of five"])
def test_most_is_left_out_of_these(name: str) -> None:
    s = next(e.site for e in examples() if e.name == name)
    q, k, v = operands(s, torch.float64)
    assert share(s, q, k) > 0.3
    far = s.reference(q, k, v) - s.replace(skip=None).reference(q, k, v)
    assert 1e-6 < float(far.abs().max()) < 1.0


def test_what_is_left_out_is_small() -> None:
    s = skipping(keep=causal(KEYS - QUERIES))
    q, k, _ = operands(s, torch.float64)
    eye = torch.eye(KEYS, dtype=torch.float64).expand(2, 2, -1, -1)
    whole, some = (x.replace(value_dim=KEYS).reference(q, k, eye) for x in (s.replace(skip=None), s))
    gone = (some == 0) & (whole > 0)
    assert gone.any()
    assert (whole.masked_fill(~gone, 0.0) <= SKIP.threshold * whole.amax(-1, keepdim=True)).all()


def test_a_tile_is_decided_in_order_and_by_all_of_its_rows() -> None:
    tops = torch.tensor([[0.0, -5.0, 3.0, -1.0, 2.0, -math.inf], [0.0, -5.0, -5.0, -5.0, -1.0, -math.inf]], dtype=torch.float64)
    z = tops.repeat_interleave(16, 1)[None, None]
    skip = Skip(math.exp(-2.0), None, 16, 16)
    assert left_out(skip, z, 96, 1)[0, 0, :, ::16].tolist() == [[False, True, False, True, False, True]] * 2
    # of the second row alone, a tile one below its maximum is wanted
    assert left_out(skip, z[:, :, 1:], 96, 1)[0, 0, 0, ::16].tolist() == [False, True, True, True, False, True]
    # in runs of two tiles each begins anew; both rows are heads of one key head
    heads = z.reshape(1, 2, 1, 96)
    assert left_out(replace(skip, chunk=32), heads, 96, 2)[0, 0, 0, ::16].tolist() == [False, True, False, False, False, True]
    # columns from the middle of a tile on, the first ones met
    assert left_out(skip, z[:, :, :1, 40:], 96, 1, first=40)[0, 0, 0, ::8].tolist() == [False, True, True, False, False, True, True]


def test_the_limit_falls_with_the_length() -> None:
    assert Skip(0.5, 100.0, 16, 16).limit(150) == math.log(0.5)
    assert Skip(0.5, 100.0, 16, 16).limit(1000) == pytest.approx(math.log(0.1))
    assert skips.limit(Skip(0.25, None, 16, 16), 7) == pytest.approx(-2.0)
    assert skips.limit(None, 7) is None


def test_rows_of_nan_stay_their_own() -> None:
    s = skipping(keep=causal(KEYS - QUERIES))
    q, k, v = operands(s, torch.float32)
    q[0, 1, 5] = math.nan
    out = torch.ops.attnfx.attention(q, k, v, [], [], plan_text(s, "portable"))
    assert out[0, 1, 5].isnan().all()
    assert not out[0, 1, 6:].isnan().any()
    assert not out[1].isnan().any()


def test_there_is_no_gradient() -> None:
    found = make_plan(skipping().replace(requires_grad=True), "portable")
    assert isinstance(found, tuple)
    assert "a gradient is wanted" in found[0]
    s = skipping()
    q, k, v = inputs(s, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.ops.attnfx.attention(q, k, v, [], [], plan_text(s, "portable")).sum().backward()


def test_what_has_no_lowering_is_refused() -> None:
    gated = skipping(weight=load(0, H), side=(side(4),))
    assert gated.weight != ONE
    for s, reason in ((gated, "more than a softmax"), (skipping().replace(normaliser="max"), "more than a softmax")):
        found = make_plan(s, "flash")
        assert isinstance(found, tuple)
        assert any(reason in sentence for sentence in found)
    assert any("left out" in sentence for sentence in vendor.objections(skipping()))
    assert vendor.objections(site()) == ()


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("skip", [SKIP, STEP, Skip(0.1, None, 128, 64)])
def test_blocks_are_the_tiles(skip: Skip, target: str) -> None:
    chosen = skips.config(skip, torch.bfloat16, 128, 128, target)
    assert (chosen.block_m, chosen.block_n) == (skip.rows, skip.keys)
    assert skips.tile(skip, torch.bfloat16, 128, 128, target).block_n == skip.keys
