"""Linear attention under padding: keys that a mask of data hides, in a prefill, in both directions, and in decode steps."""

from __future__ import annotations

import pytest
import sympy
import torch
from variant_cases import BATCH, SCALE, site_of, tensors_of

from attnfx import expr
from attnfx.composing import Composition, OnTensors, composed
from attnfx.expr import Expr
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants import MALA, Lightning, LinearAttention
from attnfx.variants.base import Example, Variant

N = 37
SIDE = SideTensor((sympy.Integer(BATCH), sympy.Integer(1), sympy.Integer(N)), torch.bool)
B, H, I, J = (expr.index(name) for name in "bhij")
SLOPES = (-0.1, -0.2, -0.3, -0.4)
MAPS = (
    LinearAttention(), LinearAttention("exp", eps=0.5), LinearAttention("cosine"), LinearAttention("relu"),
    LinearAttention("softmax_pair"), LinearAttention("taylor2"), LinearAttention("identity", normalize=False),
)  # fmt: skip
DECAYING = (LinearAttention("elu", SLOPES, normalize=False), LinearAttention("exp", (-0.25,)), Lightning())


def padded(example: Example, *indices: Expr) -> AttentionSite:
    site = site_of(example, torch.float64)
    shown = expr.Load(0, indices or (B, expr.integer(0), J), torch.bool)
    return site.replace(keep=expr.logical_and(site.keep, shown), side=(SIDE,), empty_rows="zero")


def real() -> torch.Tensor:
    """Padding in front of the first sequence and behind the second one."""
    mask = torch.ones(BATCH, 1, N, dtype=torch.bool)
    mask[0, :, :4], mask[1, :, 30:] = False, False
    return mask


@pytest.mark.parametrize(
    "example", [Example(v) for v in (*MAPS, *DECAYING)] + [Example(v, 13, causal=False) for v in MAPS], ids=repr
)
def test_hidden_keys_take_no_part_and_get_no_gradient(example: Example) -> None:
    site = padded(example)
    assert example.variant.objections(site) == ()
    leaves = [t.requires_grad_() for t in tensors_of(example, torch.float64)]
    got = example.variant.compose(OnTensors(site, (real(),), leaves[0].device, "portable"), *leaves)
    want = example.variant.reference(*leaves, SCALE, causal=example.causal, keep=real()[:, None])
    rows = slice(4, 30) if example.causal else slice(None)  # a query with no key before it divides by what is added alone
    torch.testing.assert_close(got[:, :, rows], want[:, :, rows], rtol=1e-7, atol=1e-7)
    by = torch.randn_like(want)[:, :, rows]
    mine = torch.autograd.grad((got[:, :, rows] * by).sum(), leaves)
    for one, other in zip(mine, torch.autograd.grad((want[:, :, rows] * by).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not mine[1][0, :, :4].any()


@pytest.mark.parametrize("variant", [*MAPS, *DECAYING], ids=repr)
def test_a_decode_step_stands_at_the_last_key_that_is_shown(variant: Variant) -> None:
    example = Example(variant, 1, N, causal=False)
    site, (q, k, v) = padded(example), tensors_of(example, torch.float64)
    made = composed(variant, site, "portable")
    assert isinstance(made, Composition)
    got = made.compose(OnTensors(site, (real(),), q.device, "portable"), q, k, v)
    first = variant.reference(q[:1], k[:1], v[:1], SCALE, causal=True, keep=real()[:1, None])
    second = variant.reference(q[1:], k[1:, :, :30], v[1:, :, :30], SCALE, causal=True)
    torch.testing.assert_close(got, torch.cat([first, second]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("indices", [(B, expr.integer(0), I), (H, expr.integer(0), J)], ids=["by queries", "by heads"])
def test_other_masks_of_data_are_refused(indices: tuple[Expr, ...]) -> None:
    for variant in (LinearAttention(), Lightning()):
        assert "not plainly causal" in variant.objections(padded(Example(variant), *indices))[0]
    assert MALA().objections(padded(Example(MALA(), causal=False)))  # whose weights need the number of keys
