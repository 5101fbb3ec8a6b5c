"""Comparisons whose sides are parted compare as they did, for every pair of positions."""

from __future__ import annotations

import operator

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.expr import INDEX, Call
from attnfx.lowering.comparisons import parted

I, J = expr.index("i"), expr.index("j")
_MEANING = {"lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne}
COMPARISONS = {
    "causal": expr.le(J, I),
    "window": expr.lt(I - J, expr.integer(5)),
    "ahead": expr.lt(J - I, expr.integer(3)),
    "doubled": expr.le(I * expr.integer(2) - J * expr.integer(2), expr.integer(7)),
    "centred": expr.le(expr.call("abs", I - J), expr.integer(4)),
    "centred, strictly": expr.lt(expr.call("abs", J - I + expr.integer(1)), expr.integer(4)),
    "blocks": expr.le(expr.floordiv(I, expr.integer(4)) - expr.floordiv(J, expr.integer(4)), expr.integer(1)),
    "diagonal": expr.eq(I - J, expr.integer(2)),
    "product": expr.lt(I * J, expr.integer(30)),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_parted_sides_compare_as_before(name: str) -> None:
    e = COMPARISONS[name]
    assert isinstance(e, Call)
    found = parted(e)
    assert found
    for at in [(i, j) for i in range(12) for j in range(12)]:
        here = dict(zip((INDEX["i"], INDEX["j"]), map(sympy.Integer, at), strict=True))
        ours = all(_MEANING[e.op](left.xreplace(here), right.xreplace(here)) for left, right in found)
        assert ours == bool(evaluated(e, at)), at


@pytest.mark.parametrize("name", [n for n in COMPARISONS if n != "product"])
def test_no_side_holds_both(name: str) -> None:
    e = COMPARISONS[name]
    assert isinstance(e, Call)
    assert not any({INDEX["i"], INDEX["j"]} <= side.free_symbols for sides in parted(e) for side in sides)


def test_a_constant_near_the_end_of_int32_stays_alone() -> None:
    e = expr.lt(I - J, expr.integer(2**31 - 1))
    assert isinstance(e, Call)
    ((left, right),) = parted(e)
    assert right.is_Integer
    assert left.free_symbols == {INDEX["i"], INDEX["j"]}


def test_floats_are_not_parted() -> None:
    e = expr.lt(expr.cast(I - J, torch.float32), expr.constant(2.0, torch.float32))
    assert isinstance(e, Call)
    assert not parted(e)


def evaluated(e: expr.Expr, at: tuple[int, int]) -> torch.Tensor:
    from attnfx.algebra.evaluate import evaluate

    made = evaluate(e, dict(zip("ij", (torch.tensor(x) for x in at), strict=True)), (), {})
    assert isinstance(made, torch.Tensor)
    return made
