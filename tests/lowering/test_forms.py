"""The form that a plan chooses for each term of a bias, and that every form gives the numbers and gradients of float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from form_sites import CASES, COSINE, F32, SLOPES, loads_of, real
from lowering_sites import (
    MIN32,
    SCALED,
    H,
    I,
    J,
    alibi,
    causal,
    distance,
    inputs,
    load,
    side,
    site,
)
from torch import Tensor

from attnfx import expr
from attnfx.algebra.nodes import UNARY
from attnfx.expr import Expr
from attnfx.lowering import costs, form_text, forms, ops
from attnfx.lowering.plan import KernelPlan, choices, make_plan
from attnfx.site import AttentionSite


@pytest.mark.parametrize("name", CASES)
def test_forms(name: str) -> None:
    s, want = CASES[name]
    assert isinstance(make_plan(s, "portable"), KernelPlan)
    found = choices(s)
    assert tuple(c.form for c in found) == want
    assert all("slots" in form_text.sentence(c) for c in found)


def test_a_separable_bias_that_stays_says_why() -> None:
    (points,), (long,) = choices(CASES["points"][0]), choices(CASES["alibi too long for float32"][0])
    assert points.why == "rank 4, but its numbers are data, whose products may cancel"
    assert long.why == "rank 1, but its products are too large for float32 here"


def plan_of(s: AttentionSite) -> KernelPlan:
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan), plan
    assert KernelPlan.from_json(plan.to_json()) == plan
    return plan


@pytest.mark.parametrize(
    ("changes", "drops"),
    [
        ({}, True),
        ({"keep": causal(16)}, True),
        ({"keep": causal(16), "fill": MIN32, "empty_rows": "fill"}, True),
        ({"keep": causal(16), "fill": MIN32, "empty_rows": "fill", "additive": True}, True),
        ({"keep": causal(16), "fill": -1e9, "empty_rows": "fill"}, False),
        ({"sink": load(0, H)}, False),
    ],
)
def test_what_a_row_shares_is_dropped_where_nobody_sees_it(changes: dict[str, Any], drops: bool) -> None:
    plan = plan_of(site(alibi(), side=(SLOPES,), **changes))
    assert (plan.shift is not None) == drops
    assert len(plan.tables) == (1 if drops else 2 if plan.tables else 0)


def both(s: AttentionSite, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output, LSE and gradients through the plan in ``dtype``, and through the plain meaning in float64."""
    q, k, v = inputs(s, dtype)
    given = loads_of(s, dtype)
    push = torch.randn(*q.shape[:3], s.value_dim, dtype=dtype)
    found = ops.attention_lse(q, k, v, given, [], plan_of(s).to_json())
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in (q, k, v, *given)]
    want = s.reference_lse(wide[0], wide[1], wide[2], *wide[3:])

    def all_of(results: Sequence[Tensor], leaves: Sequence[Tensor], push: Tensor) -> list[Tensor]:
        total = (results[0] * push).sum() + (results[1].masked_fill(results[1] < -1e30, 0.0) * 0.1).sum()
        return [*results, *torch.autograd.grad(total, [t for t in leaves if t.requires_grad])]

    return all_of(found, (q, k, v, *given), push), all_of(want, wide, push.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in CASES if not any(word in n for word in ("too long", "half", "rounded"))])
def test_every_form_computes_the_bias(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    found, want = both(CASES[name][0].replace(dtype=dtype), dtype)
    for mine, theirs in zip(found, want, strict=True):
        assert distance(mine, theirs) < (2e-5 if dtype == torch.float32 else 1e-11)


FILLS: dict[str, dict[str, Any]] = {
    "empty rows": {"keep": causal(-5)},
    "empty rows of zeros": {"keep": causal(-5), "empty_rows": "zero"},
    "replaced": {"keep": causal(-5), "fill": MIN32, "empty_rows": "fill"},
    "added": {"keep": causal(-5), "fill": MIN32, "empty_rows": "fill", "additive": True},
    "in reach": {"keep": causal(-5), "fill": -3.0, "empty_rows": "fill"},
    "sink": {"keep": causal(16), "sink": load(0, H)},
}


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("bias", [load(0, H) * real(J - I), COSINE * 2.0 - load(0, H) * real(I)], ids=["alibi", "sinusoid"])
def test_a_dropped_term_changes_nothing_under_any_mask(name: str, bias: Expr) -> None:
    torch.manual_seed(2)
    found, want = both(site(SCALED + bias, side=(SLOPES,), **FILLS[name]), torch.float32)
    assert distance(found[0], want[0]) < 2e-5
    for mine, theirs in zip(found[2:], want[2:], strict=True):
        assert distance(mine, theirs) < 5e-5
    seen = want[1] > -1e30
    assert distance(found[1][seen], want[1][seen]) < 2e-5


def test_nothing_is_dropped_where_the_row_maximum_is_a_result() -> None:
    """Exponentials that only their row's maximum divides give that maximum, too: a shift of the row would change it."""
    s = site(alibi(), causal(), side=(side(4),))
    dropped, kept = make_plan(s, "portable"), make_plan(s.replace(normaliser="max"), "portable")
    assert isinstance(dropped, KernelPlan)
    assert isinstance(kept, KernelPlan), kept
    assert dropped.shift is not None
    assert kept.shift is None


def test_a_bias_inside_of_a_softcap_is_not_shifted() -> None:
    bias = load(0, H) * real(J - I)
    capped = expr.call("tanh", (SCALED + bias) * 0.3) * 3.0
    for score in (capped, capped + bias):
        plan = plan_of(site(score, side=(SLOPES,)))
        assert plan.shift is None
        found, want = both(site(score, side=(SLOPES,)), torch.float32)
        assert distance(found[0], want[0]) < 2e-5


def test_a_larger_limit_is_a_larger_error() -> None:
    """What the limit of products keeps out: the same bias, forced into a number for each key, is less exact."""
    long = site(alibi(), causal(), side=(SLOPES,), queries=1500, keys=1500, batch=1)
    torch.manual_seed(3)
    exact, want = both(long, torch.float32)
    saved = forms.SIZE[F32]
    forms.SIZE[F32] = 1e9
    forms.choose.cache_clear()
    make_plan.cache_clear()
    try:
        forced, _ = both(long, torch.float32)
        assert choices(long)[0].form == "key"
    finally:
        forms.SIZE[F32] = saved
        forms.choose.cache_clear()
        make_plan.cache_clear()
    assert distance(exact[0], want[0]) < 2e-5
    assert distance(forced[1], want[1]) > distance(exact[1], want[1])


def test_every_function_of_a_number_has_a_cost() -> None:
    """What a special function unit or a series computes costs more than an addition."""
    plain = {"neg", "abs", "floor", "ceil", "trunc", "round", "not"}
    x = load(0, J)
    for op in set(UNARY) - {"not"}:
        cost = costs.everywhere(expr.call(op, x, dtype=torch.float32)) - costs.everywhere(x)
        assert cost == (costs.COSTS.fma if op in plain else costs.COSTS.transcendental), op
