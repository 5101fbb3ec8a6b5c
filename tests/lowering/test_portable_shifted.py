"""Masks by distance: which are, and that what is remembered of one block serves another that lies alike."""

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.lowering.plan import make_plan
from attnfx.lowering.portable import shifted
from attnfx.lowering.portable.blocks import Problem
from attnfx.site import AttentionSite, SideTensor

I, J, B = expr.index("i"), expr.index("j"), expr.index("b")
AHEAD = sympy.Symbol("ahead", integer=True)
WINDOW = expr.logical_and(expr.le(J, I), expr.lt(I - J, expr.integer(5)))
BY_DISTANCE = {
    "causal": expr.le(J, I),
    "window": WINDOW,
    "centred": expr.le(expr.call("abs", I - J), expr.integer(3)),
    "ahead": expr.le(J, I + expr.Int(AHEAD)),
    "sides": expr.logical_or(expr.lt(J + expr.integer(2), I), expr.lt(I, J)),
}
OTHERS = {
    "sinks": expr.logical_or(WINDOW, expr.lt(J, expr.integer(2))),
    "blocks": expr.eq(expr.floordiv(I, expr.integer(4)), expr.floordiv(J, expr.integer(4))),
    "doubled": expr.le(J, I * expr.integer(2)),
    "padding": expr.Load(0, (B, J), torch.bool),
}


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_masks_of_a_distance(name: str) -> None:
    assert shifted.by_distance(BY_DISTANCE[name])


@pytest.mark.parametrize("name", OTHERS)
def test_masks_of_more_than_a_distance(name: str) -> None:
    assert not shifted.by_distance(OTHERS[name])


def problem_of(keep: expr.Expr, length: int = 40, side: tuple[SideTensor, ...] = ()) -> Problem:
    n = sympy.Integer
    site = AttentionSite(n(1), n(2), n(2), n(length), n(length), 8, 8, torch.float32, "cpu", expr.Score() * 0.5, keep, side=side)
    plan = make_plan(site, "portable")
    loads = [torch.ones([int(s) for s in t.shape], dtype=t.dtype) for t in side]
    q = torch.zeros(1, 2, length, 8)
    return Problem(plan, q, q, q, loads, (), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["causal", "window", "centred"])
def test_what_is_remembered_is_the_mask_of_every_block(name: str) -> None:
    problem = problem_of(BY_DISTANCE[name])
    for first in range(0, 40, 8):
        block = problem.block(range(1), range(2), range(first, first + 8))
        found = shifted.additive(problem, block)
        grid = {"i": torch.arange(first, first + 8)[:, None], "j": torch.arange(block.keys.start, block.keys.stop)}
        kept = evaluate(BY_DISTANCE[name], grid, (), {})
        assert found is not None
        assert torch.equal(found == 0.0, kept.expand(found.shape))
        assert bool(((found == 0.0) | (found == float("-inf"))).all())


def test_blocks_that_lie_alike_share_one_tensor() -> None:
    problem = problem_of(WINDOW)
    one, other = (shifted.additive(problem, problem.block(range(1), range(2), range(r, r + 8))) for r in (16, 24))
    assert one is other is not None


def test_another_size_in_the_mask_is_another_mask() -> None:
    keep = BY_DISTANCE["ahead"]
    made = [shifted._additive(keep, ((AHEAD, n),), 0, 4, 8, torch.device("cpu")) for n in (0, 2)]
    assert int((made[1] == 0).sum()) > int((made[0] == 0).sum())


def test_a_large_mask_is_not_remembered() -> None:
    problem = problem_of(expr.le(J, I), length=512)
    assert shifted.additive(problem, problem.block(range(1), range(2), range(0, 512))) is None


def test_a_mask_of_data_is_not_remembered() -> None:
    side = SideTensor((sympy.Integer(1), sympy.Integer(40)), torch.bool)
    problem = problem_of(OTHERS["padding"], side=(side,))
    assert shifted.additive(problem, problem.block(range(1), range(2), range(8))) is None
