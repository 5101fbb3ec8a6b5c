"""Choices from the data: what they refuse, and what they keep, against definitions by hand."""

from __future__ import annotations

import pytest
import torch
from variant_cases import site_of

from attnfx import expr
from attnfx.expr import Expr, Score
from attnfx.site import SideTensor
from attnfx.variants import BlockTopK, PooledBlocks, selection
from attnfx.variants.base import Example, Variant


def over(e: Expr, by: float) -> Expr:
    return expr.div(e, expr.lift(by))


SCORE: Expr = Score()
CAPPED = expr.call("tanh", over(SCORE, 20.0)) * 20.0
BIAS = expr.Load(0, (expr.index("h"), expr.index("j")), torch.float32)


@pytest.mark.parametrize(
    ("score", "direction"),
    [
        (SCORE, 1), (SCORE * 0.25, 1), (SCORE * -0.25, -1), (over(SCORE, -8.0), -1), (SCORE * 0.0, 0), (CAPPED + BIAS, 1),
        (CAPPED * -2.0, -1), (expr.lift(3.0) - SCORE, -1), (expr.call("neg", SCORE * -1.0), 1), (SCORE * BIAS, 0),
        (SCORE * SCORE, 0), (expr.div(expr.lift(1.0), SCORE), 0), (expr.call("abs", SCORE), 0),
        (expr.where(expr.le(expr.index("i"), expr.integer(3)), SCORE * 0.5, BIAS), 1),
        (expr.where(expr.lt(SCORE, expr.lift(0.0)), SCORE, BIAS), 0),
    ],
)  # fmt: skip
def test_the_direction_of_scores(score: Expr, direction: int) -> None:
    assert selection.direction(score) == direction


@pytest.mark.parametrize("variant", [BlockTopK(2, 4), PooledBlocks(2, 4)], ids=repr)
def test_scores_that_fall_with_the_product_are_refused(variant: Variant) -> None:
    site = site_of(Example(variant), torch.float32)
    assert variant.objections(site) == ()
    assert "not proved to grow" in variant.objections(site.replace(score=SCORE * -0.25))[0]
    biased = site.replace(score=SCORE * BIAS, side=(SideTensor((site.heads, site.keys), torch.float32),))
    assert "not proved to grow" in variant.objections(biased)[0]
