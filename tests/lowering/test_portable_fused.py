"""Masks of torch's CPU kernel: how they are made, and how many rows of queries one call of it takes."""

import math

import pytest
import torch
from lowering_sites import SCALED, B, H, J, causal, load, side, site, window
from torch import Tensor

from attnfx import expr
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.portable import aten, forward
from attnfx.lowering.portable.aten import Fused
from attnfx.lowering.portable.blocks import Problem
from attnfx.site import AttentionSite

LONG = {"batch": 2, "heads": 4, "key_heads": 4, "queries": 2000, "keys": 2000, "empty_rows": "zero"}
PADDING = {"keep": load(0, B, J, dtype=torch.bool), "side": (side(2, 2000, dtype=torch.bool),)}


def plan_of(s: AttentionSite) -> KernelPlan:
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan), plan
    return plan


def operands(s: AttentionSite) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    heads = (int(s.heads), int(s.key_heads), int(s.key_heads))
    lengths = (int(s.queries), int(s.keys), int(s.keys))
    return tuple(torch.randn(int(s.batch), h, n, s.head_dim) for h, n in zip(heads, lengths, strict=True))


@pytest.mark.parametrize("bad", [0.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("shape", [(8, 1, 6), (8, 5, 6), (1, 1, 6)], ids=["of keys", "of pairs", "alike"])
def test_what_is_not_kept_is_minus_infinity_whatever_the_bias_is(bad: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    keep, bias = torch.rand(5, 6) < 0.5, torch.randn(shape)
    bias[..., 2], bias[0, 0, 3] = bad, bad
    torch.testing.assert_close(aten._masked(bias, keep), torch.where(keep, bias, -math.inf), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("s", "first"),
    [
        (site(**PADDING, **LONG), range(2000)),
        (site(keep=window(200), **LONG), range(aten.ROWS // 2)),
        (site(keep=window(900), **LONG), range(aten.ROWS)),
        (site(keep=causal(-5), **LONG), range(aten.ROWS)),
        (site(keep=causal(-5), **LONG | {"queries": 400, "keys": 400}), range(aten.ROWS // 2)),
    ],
    ids=["padding", "narrow", "wide", "causal", "short"],
)
def test_rows_of_one_call(s: AttentionSite, first: range) -> None:
    loads = [torch.ones(2, 2000, dtype=torch.bool)] if s.side else []
    problem = Problem(plan_of(s), *operands(s), loads, (), None)
    fused = Fused.of(problem)
    assert fused is not None
    rows = list(fused.rows())
    assert rows[0] == first
    assert [i for run in rows for i in run] == list(range(problem.rows))


@pytest.mark.parametrize("poison", [0.0, math.nan], ids=["plain", "NaN under the mask"])
def test_key_padding_and_a_bias_of_each_head_and_key(poison: float) -> None:
    keep = expr.logical_and(load(0, B, J, dtype=torch.bool), causal())
    s = site(
        SCALED + load(1, H, J), keep, side=(side(2, 300, dtype=torch.bool), side(4, 300)), **LONG | {"queries": 300, "keys": 300}
    )
    loads = [torch.arange(300).expand(2, 300) < torch.tensor([[300], [211]]), torch.randn(4, 300)]
    loads[0] = loads[0] & (torch.arange(300) != 5)
    q, k, v = operands(s)
    want = s.reference(*(t.double() for t in (q, k, v)), *loads)
    loads[1][:, 5] = poison
    found = forward(plan_of(s), q, k, v, loads, (), None).out
    assert float((found - want).norm() / want.norm()) < 1e-5
