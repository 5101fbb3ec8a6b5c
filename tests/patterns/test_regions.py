"""What is decided on one side of a diagonal is true of every query and key there."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from attnfx import expr
from attnfx.algebra.evaluate import integer
from attnfx.algebra.integers import FloorDiv, Mod, Ranges
from attnfx.expr import INDEX, Int
from attnfx.patterns.regions import Region

I, J = INDEX["i"], INDEX["j"]
N = sympy.Symbol("n", integer=True, positive=True)


def region(rows: Any, keys: Any, offset: Any = None, beyond: bool = False) -> Region:
    zero = sympy.Integer(0)
    low = {I: zero, J: zero, N: sympy.Integer(2)}
    return Region(I, J, Ranges(low, {I: rows - 1, J: keys - 1}), offset, beyond)


def test_a_skew_is_its_own_row_before_the_diagonal() -> None:
    flat = N * I + J + N
    before, beyond = region(N, N, sympy.Integer(0)), region(N, N, sympy.Integer(0), beyond=True)
    assert before.integer(FloorDiv(flat, N + 1)) == I
    assert sympy.expand(before.integer(Mod(flat, N + 1)) - (N - I + J)) == 0
    assert beyond.integer(FloorDiv(flat, N + 1)) == I + 1
    assert region(N, N).integer(FloorDiv(flat, N + 1)) == FloorDiv(flat, N + 1), "nothing is known of all pairs"


def test_both_ways_need_no_diagonal() -> None:
    flat = (2 * N - 1) * I + J + N
    assert region(N, N).integer(FloorDiv(flat, 2 * N)) == I


@pytest.mark.parametrize("offset", [-2, 0, 3])
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (4, 7), (7, 4)])
def test_decisions_hold_for_every_pair(rows: int, keys: int, offset: int, beyond: bool) -> None:
    made = region(sympy.Integer(rows), sympy.Integer(keys), sympy.Integer(offset), beyond)
    pairs = [(i, j) for i in range(rows) for j in range(keys) if (j > i + offset) == beyond]
    for a in (keys * I + J + rows, (keys + 1) * I + J, keys * I + J + 1, J - I + keys):
        for by in (keys, keys + 1, 2 * keys):
            for e in (FloorDiv(a, sympy.Integer(by)), Mod(a, sympy.Integer(by))):
                for i, j in pairs:
                    assert integer(made.integer(e), {I: i, J: j}) == integer(e, {I: i, J: j})
        for other in (sympy.Integer(3), I, J + 1):
            decided = made.expression(expr.le(Int(a), Int(other)))
            if decided in (expr.TRUE, expr.FALSE):
                for i, j in pairs:
                    assert (integer(a, {I: i, J: j}) <= integer(other, {I: i, J: j})) == (decided == expr.TRUE)
