"""What a mask decides about the scores that it keeps, and that masked scores stay numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from form_sites import LEARNED, SLOPES, real
from lowering_sites import KEYS, MIN32, SCALED, H, I, J, causal, load, side, site
from test_forms import both, distance, plan_of

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.lowering.kept import where_kept
from attnfx.lowering.plan import choices

AWAY = expr.call("abs", I - J)
BEFORE = expr.maximum(I - J, expr.integer(0))
CHOSEN = expr.where(expr.le(J, I), real(I - J), expr.constant(7.0, torch.float32))
WINDOW = expr.logical_and(causal(), expr.le(I, Int(J.value + 3)))
ANTICAUSAL = expr.le(I, J)


def scores(e: Expr) -> Expr:
    return SCALED + load(0, H) * e


@pytest.mark.parametrize(
    ("given", "keep", "want"),
    [
        (AWAY, causal(), I - J),
        (AWAY, WINDOW, I - J),
        (AWAY, ANTICAUSAL, J - I),
        (AWAY, causal(-2), I - J),
        (AWAY, causal(1), AWAY),
        (AWAY, expr.TRUE, AWAY),
        (AWAY, expr.logical_and(causal(), expr.ne(load(1, J, dtype=torch.int64), expr.integer(0))), I - J),
        (AWAY, expr.logical_or(causal(), expr.lt(J, expr.integer(4))), AWAY),
        (BEFORE, causal(), I - J),
        (expr.minimum(J - I, expr.integer(0)), causal(), J - I),
        (expr.maximum(J - I, expr.integer(0)), causal(), expr.integer(0)),
        (expr.minimum(AWAY, expr.integer(3)), WINDOW, I - J),
        (expr.minimum(AWAY, expr.integer(2)), WINDOW, expr.minimum(I - J, expr.integer(2))),
        (CHOSEN, causal(), real(I - J)),
        (expr.where(expr.lt(I, J), CHOSEN, real(I)), causal(), real(I)),
        (load(2, AWAY), causal(), load(2, I - J)),
        (real(AWAY) * 0.5, causal(), real(I - J) * 0.5),
        # a number of every size may stand here, and below zero these have no value
        (expr.call("log", real(AWAY), dtype=torch.float32), causal(), None),
        (expr.call("sqrt", real(BEFORE), dtype=torch.float32), causal(), None),
        (expr.where(expr.le(J, I), expr.call("sqrt", real(I - J), dtype=torch.float32), real(I)), causal(), None),
    ],
)  # fmt: skip
def test_what_the_mask_decides(given: Expr, keep: Expr, want: Expr | None) -> None:
    s = site(scores(given), keep, side=(SLOPES, side(KEYS, dtype=torch.int64), side(KEYS)))
    assert where_kept(s, False) == scores(given if want is None else want)


@pytest.mark.parametrize(
    ("changes", "decided"),
    [
        ({}, True),
        ({"additive": True}, True),
        ({"fill": MIN32, "empty_rows": "fill", "additive": True}, True),
        ({"fill": -1e9, "empty_rows": "fill"}, True),
        ({"fill": -1e9, "empty_rows": "fill", "additive": True}, False),
        ({"fill": -3.0, "empty_rows": "fill", "additive": True}, False),
    ],
)
def test_masked_scores_that_matter_stay(changes: dict[str, Any], decided: bool) -> None:
    s = site(scores(AWAY), causal(), side=(SLOPES,), **changes)
    assert (where_kept(s, True) != s.score) is decided


SMALLEST = expr.where(expr.le(J, I), SCALED, expr.constant(MIN32, torch.float32))


@pytest.mark.parametrize("given", [SMALLEST, scores(load(1, AWAY)), SCALED + expr.where(expr.le(J, I), real(I), load(1, J))])
def test_what_may_be_as_far_as_the_fill_stays_where_masked_scores_have_weight(given: Expr) -> None:
    s = site(given, causal(), side=(SLOPES, side(KEYS)), fill=MIN32, empty_rows="fill", additive=True)
    assert where_kept(s, True) == given
    assert where_kept(s, False) != given


def test_what_is_learned_stays_where_masked_scores_have_weight() -> None:
    s = site(scores(AWAY), causal(), side=(LEARNED,), fill=MIN32, empty_rows="fill", additive=True)
    assert where_kept(s, True) == s.score
    assert where_kept(s, False) != s.score


def test_symmetric_alibi_under_a_causal_mask_is_a_number_for_each_key() -> None:
    s = site(scores(real(AWAY)), causal(), side=(SLOPES,))
    (found,) = choices(s)
    assert found.form == "key"
    assert plan_of(s).shift is not None


MASKS: dict[str, dict[str, Any]] = {
    "replaced": {"keep": causal()},
    "in reach": {"keep": causal(), "fill": -3.0, "empty_rows": "fill"},
    "empty rows": {"keep": causal(-5)},
    "empty rows of zeros": {"keep": causal(-5), "empty_rows": "zero"},
    "empty rows of a fill": {"keep": causal(-5), "fill": MIN32, "empty_rows": "fill"},
    "added": {"keep": causal(-5), "fill": MIN32, "empty_rows": "fill", "additive": True},
    "added in reach": {"keep": causal(-5), "fill": -4.0, "empty_rows": "fill", "additive": True},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("bias", "tensor"),
    [(real(AWAY), SLOPES), (real(AWAY), LEARNED), (real(BEFORE), SLOPES), (real(BEFORE), LEARNED), (CHOSEN, SLOPES)],
    ids=["symmetric", "symmetric, learned", "clamped", "clamped, learned", "chosen"],
)
def test_results_and_gradients(bias: Expr, tensor: Any, mask: str) -> None:
    torch.manual_seed(4)
    found, want = both(site(scores(bias), side=(tensor,), **MASKS[mask]), torch.float32)
    for mine, theirs in zip(found, want, strict=True):
        assert distance(mine, theirs) < 5e-5


@pytest.mark.parametrize("mask", MASKS)
def test_scores_masked_twice(mask: str) -> None:
    torch.manual_seed(5)
    found, want = both(site(SMALLEST, **MASKS[mask]), torch.float32)
    for mine, theirs in zip(found, want, strict=True):
        assert distance(mine, theirs) < 5e-5
