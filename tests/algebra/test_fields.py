"""Packed numbers: one comparison says what comparisons of each say, is known again, and encloses tiles as they do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfx import expr
from attnfx.algebra import fields
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.intervals import enclose
from attnfx.expr import Expr, Load

WIDTHS = [(1,), (3, 4), (7, 7, 7), (9, 9, 10), (28,), (2, 1, 5, 3)]


def rows(*numbers: int) -> tuple[Expr, ...]:
    """Elements of T0: the place by j, the least and the largest by i."""
    return tuple(Load(0, (expr.integer(r), expr.index(x)), torch.int32) for r, x in zip(numbers, "jii", strict=True))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@given(data=st.data())
def test_all_fields_are_compared(widths: tuple[int, ...], data: st.DataObject) -> None:
    one = st.tuples(*(st.integers(0, 2**w - 1) for w in widths))
    place, low, high = (data.draw(one) for _ in range(3))
    table = torch.stack([fields.packed([torch.tensor([x]) for x in each], widths) for each in (place, low, high)])
    keep, want = fields.inside(*rows(0, 1, 2), widths), all(a <= p <= b for p, a, b in zip(place, low, high, strict=True))
    apart = fields.apart(keep)
    assert apart is not None
    points = {"i": torch.zeros(1, 1, dtype=torch.int64), "j": torch.zeros(1, dtype=torch.int64)}
    for e in (keep, apart):
        assert bool(evaluate(e, points, [table], {})) == want


def test_tiles_are_decided_by_each_field() -> None:
    keep = fields.inside(*rows(0, 1, 2), (3, 4))
    apart = fields.apart(keep)
    assert apart is not None
    assert enclose(keep) == enclose(apart)
    assert enclose(keep).decides
    assert len(enclose(keep).profiles) == 6


def test_nothing_else_is_taken_for_fields() -> None:
    p, low, high = rows(0, 1, 2)
    keep = fields.inside(p, low, high, (3, 4))
    plain = expr.logical_and(expr.le(low, p), expr.le(p, high))
    bare = expr.call("bitor", expr.sub(p, low), expr.sub(high, p))  # with whatever is in the guards
    others = (
        plain, expr.eq(p, low), expr.eq(expr.call("bitand", p, expr.integer(8)), expr.integer(0)), expr.logical_not(keep),
        expr.eq(expr.call("bitand", bare, expr.integer(8)), expr.integer(0)), expr.eq(p, expr.integer(0)),
    )  # fmt: skip
    assert [fields.apart(e) for e in others] == [None] * len(others)


def test_more_bits_than_there_are() -> None:
    with pytest.raises(AssertionError):
        fields.packed([torch.zeros(1)] * 4, (9, 9, 9, 9))
