"""Choices from the data: what they refuse, and what they keep, against definitions by hand."""

from __future__ import annotations

import pytest
import torch
from variant_cases import site_of

from attnfx import expr
from attnfx.composing import OnTensors
from attnfx.expr import Expr, Score
from attnfx.site import SideTensor
from attnfx.variants import BlockTopK, HierarchicalTopK, PooledBlocks, selection
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


@pytest.mark.parametrize("variant", [BlockTopK(2, 4), PooledBlocks(2, 4), HierarchicalTopK(8, 4, 4)], ids=repr)
def test_scores_that_fall_with_the_product_are_refused(variant: Variant) -> None:
    site = site_of(Example(variant), torch.float32)
    assert variant.objections(site) == ()
    assert "not proved to grow" in variant.objections(site.replace(score=SCORE * -0.25))[0]
    biased = site.replace(score=SCORE * BIAS, side=(SideTensor((site.heads, site.keys), torch.float32),))
    assert "not proved to grow" in variant.objections(biased)[0]


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_tree_of_rising_or_falling_scores_finds_the_end(slope: float) -> None:
    N, variant = 61, HierarchicalTopK(mask_k=8, block_size_q=4, block_size_k=4, sinks=0, sliding_window=0)
    site = site_of(Example(variant, N, N), torch.float64).replace(value_dim=N)
    q = torch.zeros(2, 4, N, 16, dtype=torch.float64)
    q[..., 3] = 1
    k = torch.zeros(2, 2, N, 16, dtype=torch.float64)
    k[..., 3] = slope * torch.arange(N) / N
    values = torch.eye(N, dtype=torch.float64).expand(2, 2, N, N)
    seen = variant.compose(OnTensors(site, (), q.device, "portable"), q, k, values) > 0
    for i in range(N):
        own, complete = i // 4, (i // 4 * 4 + 1) // 4  # at the first query of its block
        best = range(complete)[-2:] if slope > 0 else range(complete)[:2]
        want = [j <= i and (j // 4 in best or j // 4 == own) for j in range(N)]
        assert (seen[:, :, i] == torch.tensor(want)).all(), i
