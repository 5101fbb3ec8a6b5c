"""Orders of digits: what is moved comes back, formulas say the same as the moves, and blocks that are boxes are boxes."""

from __future__ import annotations

import math
import random

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfx.expr import INDEX
from attnfx.sites.ordering import Order, objections

IMAGE = Order((4, 8, 4, 8), (0, 2, 1, 3))


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=5))
    return Order(tuple(sizes), tuple(draw(st.permutations(range(len(sizes))))))


@settings(deadline=None)
@given(orders())
def test_formulas_say_what_the_moves_do(order: Order) -> None:
    numbers = torch.arange(order.tokens)
    x = numbers.view(1, 1, -1, 1)
    assert torch.equal(order.moved(x).flatten(), order.place(numbers))
    assert torch.equal(order.back(order.moved(x)), x)
    assert order.trivial == torch.equal(order.place(numbers), numbers)


@settings(deadline=None)
@given(orders(), st.sampled_from([2, 3, 4, 8, 16, 32, 64]))
def test_places_in_a_block_are_sums(order: Order, block: int) -> None:
    if order.additive(block):
        places = order.place(torch.arange(order.tokens)).view(-1, block)
        assert torch.equal(places, places[:, :1] + places[:1])


@settings(deadline=None)
@given(orders(), st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_boxes_hold_the_tokens_of_their_block_in_turn(order: Order, block: int) -> None:
    sides = order.boxes(block)
    if sides is None:
        return
    assert math.prod(s.length for s in sides) == order.tokens
    assert math.prod(s.box for s in sides) == block
    starts = torch.arange(0, order.tokens, block)
    found = torch.zeros(len(starts), 1, dtype=torch.int64)
    for side in sides:
        corner = sum(starts // below % size * weight for below, size, weight in side.digits)
        along = (corner[:, None] + torch.arange(side.box)) * side.step
        found = (found[:, :, None] + along[:, None, :]).flatten(1)
    assert torch.equal(found.flatten(), order.place(torch.arange(order.tokens)))


def test_a_tile_of_an_image_is_a_box_of_it() -> None:
    sides = IMAGE.boxes(64)
    assert sides is not None
    assert [(s.length, s.step, s.box) for s in sides] == [(32, 32, 8), (32, 1, 8)]
    # half a tile is one too; of two tiles, one beside the other, the tokens are not counted row by row
    assert IMAGE.boxes(32) is not None
    assert IMAGE.boxes(128) is None
    assert IMAGE.additive(128)


def test_a_block_that_cuts_a_digit_is_none() -> None:
    order = Order((5, 12), (1, 0))
    assert not order.additive(2)
    assert order.boxes(10) is None
    assert order.additive(5)


def test_some_digits_are_a_number() -> None:
    j = INDEX["j"]
    row, column = (IMAGE.number(axes, j) for axes in ((0, 1), (2, 3)))
    token = random.Random(0).randrange(1024)
    place = int(IMAGE.place(torch.tensor(token)))
    assert [int(e.subs(j, token)) for e in (row, column)] == [place // 32, place % 32]


@pytest.mark.parametrize(("queries", "alone", "said"), [(1023, True, "one of 1024 tokens"), (1024, False, "second product")])
def test_what_has_no_order_is_told(queries: int, alone: bool, said: str) -> None:
    (sentence,) = objections(IMAGE, sympy.Integer(queries), sympy.Integer(queries), alone)
    assert said in sentence
    assert objections(IMAGE, sympy.Integer(1024), sympy.Integer(1024), True) == ()
    assert objections(None, sympy.Integer(queries), sympy.Integer(queries), alone) == ()
