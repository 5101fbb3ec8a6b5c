"""Every variant on torch operations: its composition against its oracle in float64, with gradients, and its picture."""

from __future__ import annotations

import pytest
import torch
from variant_cases import BATCH, EXAMPLES, SCALE, applied, grouped_apart, oracle, site_of, tensors_of

from attnfx import expr
from attnfx.composing import OnTensors
from attnfx.site import SideTensor
from attnfx.variants.base import Example


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_the_composition_is_the_oracle(example: Example) -> None:
    for each in {example, grouped_apart(example)}:
        q, k, v = tensors_of(each, torch.float64)
        torch.testing.assert_close(applied(each, q, k, v), oracle(each, q, k, v), rtol=each.tolerance, atol=each.tolerance)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_padding_of_the_model_still_holds_or_is_refused(example: Example) -> None:
    site, (q, k, v) = site_of(example, torch.float64), tensors_of(example, torch.float64)
    real = torch.rand(BATCH, example.keys) < 0.7
    slot = expr.Load(len(site.side), (expr.index("b"), expr.index("j")), torch.bool)
    side = (SideTensor((site.batch, site.keys), torch.bool),)
    padded = site.replace(keep=expr.logical_and(site.keep, slot), side=side, empty_rows="zero")
    if example.variant.objections(padded):
        return
    out = example.variant.compose(OnTensors(padded, (real,), q.device, "portable"), q, k, v)
    want = example.variant.reference(q, k, v, SCALE, causal=example.causal, keep=real[:, None, None])
    torch.testing.assert_close(out, want.nan_to_num(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_half_precision(example: Example) -> None:
    tensors = tensors_of(example, torch.bfloat16)
    out, want = applied(example, *tensors), oracle(example, *(t.double() for t in tensors))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.isnan(), want.isnan())
    assert float((out.double() - want).nan_to_num().norm() / want.nan_to_num().norm()) < 0.02


@pytest.mark.parametrize("example", [e for e in EXAMPLES.values() if e.learns], ids=[n for n, e in EXAMPLES.items() if e.learns])
def test_gradients_are_the_oracles(example: Example) -> None:
    leaves = [t.requires_grad_() for t in tensors_of(example, torch.float64)]
    out = applied(example, *leaves)
    by = torch.randn(out.shape, dtype=out.dtype)
    want = torch.autograd.grad(oracle(example, *leaves), leaves, by)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, by), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


def moved(example: Example, at: int) -> float:
    """How much the queries before key ``at`` move when it and all behind it change."""
    tensors, offset = tensors_of(example, torch.float64), example.keys - example.queries
    before = applied(example, *tensors)
    q, k, v = (t.clone() for t in tensors)
    for t, first in ((q, at - offset), (k, at), (v, at)):
        t[:, :, first:] += torch.randn_like(t[:, :, first:])
    return float((applied(example, q, k, v) - before)[:, :, : at - offset].abs().max())


CAUSAL = {n: e for n, e in EXAMPLES.items() if e.causal and not e.foresees}
FORESEEING = {n: e for n, e in EXAMPLES.items() if e.causal and e.foresees}


@pytest.mark.parametrize("example", CAUSAL.values(), ids=CAUSAL)
def test_no_query_sees_what_comes_after_it(example: Example) -> None:
    M, N = example.queries, example.keys
    for at in {N - M + 1, N - M // 2, N - 1} - {N - M, N}:
        assert moved(example, at) <= 1e-12


@pytest.mark.parametrize("example", FORESEEING.values(), ids=FORESEEING)
def test_what_is_said_to_foresee_does(example: Example) -> None:
    assert moved(example, example.keys - 1) > 1e-6
