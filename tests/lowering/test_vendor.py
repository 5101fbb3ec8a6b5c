"""Which sites torch's own attention takes, and that it computes them."""

import pytest
import torch
from lowering_sites import HEADS, SCALED, H, J, causal, distance, inputs, load, side, site, softcap
from torch import Tensor

from attnfx import expr
from attnfx.expr import Score
from attnfx.lowering import vendor
from attnfx.site import AttentionSite


@pytest.mark.parametrize(
    "s", [site(), site(keep=causal(), keys=37), site(Score()), site(expr.div(Score(), expr.lift(8.0)))], ids=str
)
def test_plain_attention_has_no_objections(s: AttentionSite) -> None:
    assert vendor.objections(s) == ()
    assert s.scale is not None
    q, k, v = inputs(s, torch.float64)
    got = torch.ops.attnfx.vendor_attention(q, k, v, vendor.is_causal(s), s.scale, 0.0)
    want = s.reference(q, k, v)
    assert distance(got, want) < 1e-11
    grad = torch.randn_like(want)
    for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        assert distance(mine, theirs) < 1e-11


@pytest.mark.parametrize(
    ("s", "reason"),
    [
        (site(softcap()), "more than a scale"),
        (site(keep=causal()), "equal lengths"),
        (site(keep=causal(3), keys=37), "neither full nor exactly"),
        (site(keep=expr.le(J, expr.integer(7))), "neither full nor exactly"),
        (site(SCALED + load(0, H), side=(side(HEADS),)), "side tensors"),
        (site(keep=causal(), keys=37, fill=-1e4), "fill is -10000"),
        (site(sink=expr.constant(0.0, torch.float32)), "has a sink"),
        (site(weight=expr.constant(2.0, torch.float32)), "factor after the softmax"),
    ],
)
def test_the_rest_is_objected_to(s: AttentionSite, reason: str) -> None:
    assert any(reason in o for o in vendor.objections(s))


def test_it_compiles_with_any_sizes() -> None:
    def model(q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = torch.ops.attnfx.vendor_attention(q, k, k, True, 0.3, 0.0)
        return out

    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for length in (9, 14):
        q, k = torch.randn(2, 4, length, 8, requires_grad=True), torch.randn(2, 2, length, 8)
        torch.testing.assert_close(compiled(q, k), model(q, k))
