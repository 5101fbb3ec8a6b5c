"""What a plan decides: tables, gradients, exact rows, ranges, refusals."""

import json
import math

import pytest
import sympy
import torch
from lowering_sites import (
    HEADS,
    KEYS,
    MIN32,
    QUERIES,
    SCALED,
    B,
    H,
    I,
    J,
    causal,
    load,
    side,
    site,
    softcap,
    t5,
    window,
)  # fmt: skip

from attnfx import expr
from attnfx.expr import Expr, Load, Score
from attnfx.lowering.derivative import derivative, widened
from attnfx.lowering.gradients import BiasGradient
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.portable.blocks import Problem
from attnfx.site import AttentionSite
from attnfx.sites.serialize import FormatError


def planned(s: AttentionSite) -> KernelPlan:
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan), plan
    return plan


def test_a_gather_by_distance_becomes_a_table() -> None:
    plan = planned(site(t5(), side=(side(32, HEADS, grad=True),)))
    assert len(plan.tables) == 1
    assert plan.tables[0].axes == ("h", "i-j")
    assert plan.used_slots == (1,)
    assert plan.gradients == (BiasGradient(1, "diagonal", True, False, ("h", "i-j")),)


def test_a_cheap_function_of_distance_stays_in_the_tile() -> None:
    symmetric = SCALED + load(0, H) * expr.cast(expr.call("abs", I - J), torch.float32)
    assert planned(site(symmetric, side=(side(HEADS),))).tables == ()


def test_a_learned_function_of_distance_becomes_a_table() -> None:
    symmetric = SCALED + load(0, H) * expr.cast(expr.call("abs", I - J), torch.float32)
    plan = planned(site(symmetric, side=(side(HEADS, grad=True),)))
    assert [g.kind for g in plan.gradients] == ["diagonal"]


def test_a_function_of_more_than_the_distance_is_no_table() -> None:
    score = SCALED + load(0, H) * expr.cast(I * J, torch.float32)
    assert planned(site(score, side=(side(HEADS),))).tables == ()


@pytest.mark.parametrize(
    ("score", "shape", "reason"),
    [
        (SCALED * load(0, H, I, J), (HEADS, QUERIES, KEYS), "times a number at most"),
        (SCALED + load(0, H) * expr.cast(J, torch.float32), (HEADS,), "times a number at most"),
        (SCALED + load(0, J, J), (KEYS, KEYS), "T0[j, j]"),
        (SCALED + load(0, H, I, J) + load(0, H, I, J + 1), (HEADS, QUERIES, KEYS + 1), "T0[h, i, j + 1]"),
    ],
)
def test_a_gradient_without_a_form_is_refused(score: Expr, shape: tuple[int, ...], reason: str) -> None:
    found = make_plan(site(score, side=(side(*shape, grad=True),)), "portable")
    assert isinstance(found, tuple)
    assert reason in found[0]
    assert isinstance(make_plan(site(score, side=(side(*shape),)), "portable"), KernelPlan)


@pytest.mark.parametrize(
    ("score", "factor"),
    [
        (SCALED - load(0, H, J), -1.0),
        ((SCALED + load(0, H, J)) * 0.5, 0.5),
        (SCALED + expr.div(expr.cast(expr.call("neg", load(0, H, J)), torch.float64), expr.lift(4.0)), -0.25),
        (SCALED + load(0, H, J) * 3.0 + load(0, H, J), 4.0),
    ],
)
def test_the_gradient_of_a_bias_carries_its_factor(score: Expr, factor: float) -> None:
    plan = planned(site(score, side=(side(HEADS, KEYS, grad=True),)))
    assert plan.gradients == (BiasGradient(0, "column", True, False, ("h", "j"), factor),)
    assert KernelPlan.from_json(plan.to_json()) == plan


def test_a_bias_inside_of_a_function_of_the_scores_has_a_gradient() -> None:
    bias = load(0, H, I, J)
    shape = side(HEADS, QUERIES, KEYS, grad=True)
    capped = expr.call("tanh", (SCALED - bias) * 0.3) * 3.0
    assert planned(site(capped, side=(shape,))).gradients == (BiasGradient(0, "tile", True, False, ("h", "i", "j"), -4.0, True),)
    chosen = expr.where(causal(), SCALED + bias, expr.constant(-50.0, torch.float32))
    assert planned(site(chosen, side=(shape,))).gradients[0].inside
    for score in (capped + bias, capped + SCALED, expr.call("tanh", Score() * load(1, H) + bias), expr.call("tanh", bias * SCALED)):
        sides = (shape, side(HEADS)) if any(isinstance(n, Load) and n.slot == 1 for n in expr.walk(score)) else (shape,)
        assert isinstance(make_plan(site(score, side=sides), "portable"), tuple), score


def test_an_axis_that_folds_batch_and_head_has_a_gradient() -> None:
    folded = HEADS * B + H
    plan = planned(site(SCALED + load(0, folded, expr.integer(0), J), side=(side(2 * HEADS, 1, KEYS, grad=True),)))
    assert plan.gradients == (BiasGradient(0, "column", False, False, (folded, "", "j")),)
    assert KernelPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("factor", [1, "1", None, 1e999])
def test_a_gradient_with_no_finite_factor_is_not_read(factor: object) -> None:
    plan = planned(site(SCALED + load(0, H, J), side=(side(HEADS, KEYS, grad=True),)))
    data = json.loads(plan.to_json())
    data["gradients"][0]["factor"] = factor
    with pytest.raises(FormatError, match="finite"):
        KernelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("keep", "changes", "exact"),
    [
        (expr.TRUE, {}, False),
        (causal(), {}, False),
        (causal(), {"fill": MIN32, "empty_rows": "fill"}, False),
        (causal(), {"fill": -1e4, "empty_rows": "fill"}, True),
        (causal(-1), {}, True),
        (causal(-1), {"empty_rows": "zero"}, False),
        (expr.logical_and(causal(), load(0, B, J, dtype=torch.bool)), {"side": (side(2, KEYS, dtype=torch.bool),)}, True),
    ],
)
def test_exact_rows_are_asked_for_where_they_may_exist(keep: Expr, changes: dict[str, object], exact: bool) -> None:
    assert planned(site(keep=keep, **changes)).exact_rows is exact


def test_a_loaded_float_mask_asks_for_exact_rows() -> None:
    score = SCALED + load(0, B, I, J)
    assert planned(site(score, side=(side(2, QUERIES, KEYS),))).exact_rows
    zero = planned(site(score, side=(side(2, QUERIES, KEYS),), empty_rows="zero"))
    assert zero.exact_rows
    assert zero.empty_zero
    assert not planned(site(SCALED)).exact_rows


def test_casts_of_the_scores_are_dropped_and_others_stay() -> None:
    bias = expr.cast(load(0, H), torch.bfloat16)
    score = expr.cast(expr.add(expr.cast(SCALED, torch.bfloat16), bias, torch.bfloat16), torch.float32)
    assert widened(score) == expr.call("add", SCALED, bias, dtype=torch.float32)


@pytest.mark.parametrize("score", [SCALED, softcap(), -(Score() * 2.0), expr.call("sigmoid", SCALED), expr.call("exp", SCALED)])
def test_derivatives(score: Expr) -> None:
    from attnfx.algebra.evaluate import evaluate

    dot = torch.linspace(-3, 3, 11, dtype=torch.float64, requires_grad=True)
    grid = {"i": torch.zeros(11, dtype=torch.int64)}
    value = evaluate(score, grid, (), {}, score=dot, dtype=torch.float64)
    (want,) = torch.autograd.grad(value.sum(), dot)
    slope = derivative(score)
    assert slope is not None
    got = evaluate(slope, grid, (), {}, score=dot.detach(), dtype=torch.float64).expand(11)
    torch.testing.assert_close(got, want)


def test_no_derivative_is_a_reason() -> None:
    found = make_plan(site(expr.call("floor", SCALED)), "flash")
    assert isinstance(found, tuple)
    assert "no derivative" in found[0]
    assert isinstance(make_plan(site(expr.call("floor", SCALED), requires_grad=False), "flash"), KernelPlan)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"head_dim": 512}, "head_dim is 512"), ({"dtype": torch.float64}, "float64"), ({"fill": math.nan}, "fill is nan")],
)
def test_what_flash_does_not_take_is_refused(changes: dict[str, object], reason: str) -> None:
    found = make_plan(site(keep=causal(), **changes), "flash")
    assert isinstance(found, tuple)
    assert reason in found[0]


def test_an_index_that_may_leave_its_tensor_is_clamped() -> None:
    plan = planned(site(SCALED + load(0, J - I), causal(16), side=(side(KEYS),)))
    (found,) = (n for n in expr.walk(plan.tables[0].recipe) if isinstance(n, Load))
    assert isinstance(found.indices[0], expr.Call)
    assert found.indices[0].op == "max"


def test_slots_that_are_no_numbers_are_numbered_in_order() -> None:
    score = SCALED + Load("second", (H,), torch.float32)
    keep = Load("first", (B, J), torch.bool)
    plan = planned(site(score, keep, side=(side(HEADS), side(2, KEYS, dtype=torch.bool))))
    assert [n.slot for e in (plan.site.score, plan.site.keep) for n in expr.walk(e) if isinstance(n, Load)] == [0, 1]


@pytest.mark.parametrize("keep", [causal(), causal(5), causal(-20), window(3), window(20), expr.le(J, expr.integer(9))])
@pytest.mark.parametrize("rows", [range(0, 1), range(3, 11), range(30, 37)])
def test_key_ranges_are_tight_and_full_where_they_say(keep: Expr, rows: range) -> None:
    from attnfx.algebra.evaluate import evaluate

    plan = planned(site(keep=keep))
    q, k = torch.empty(2, 4, QUERIES, 16), torch.empty(2, 2, KEYS, 16)
    problem = Problem(plan, q, k, k, (), (), None)
    block = problem.block(range(1), range(4), rows)
    grid = {"i": torch.arange(rows.start, rows.stop)[:, None], "j": torch.arange(KEYS)}
    kept = evaluate(keep, grid, (), {}).expand(len(rows), KEYS)
    any_kept = kept.any(0).nonzero()[:, 0].tolist()
    assert (list(block.keys) if any_kept else []) == any_kept
    assert not any_kept or block.full == bool(kept[:, block.keys.start : block.keys.stop].all())


def test_symbols_are_those_of_the_site() -> None:
    s0, s1 = sympy.symbols("s0 s1", integer=True, positive=True)
    s = site(t5(), causal(s1 - s0), queries=s0, keys=s1, side=(side(32, HEADS),))
    assert planned(s).symbols == s.symbols == (s0, s1)
