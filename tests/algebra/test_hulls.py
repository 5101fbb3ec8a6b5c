"""Intervals that enclose what a predicate keeps, and terms that others imply, against every query and key."""

from __future__ import annotations

import random

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of, integer
from attnfx.algebra.hulls import rising
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, Ranges
from attnfx.expr import Expr, Int, index
from attnfx.lowering.ranges import FIRST, LAST, Bounds, Candidates, key_bounds, query_bounds
from attnfx.sites.facts import Facts, prove

I, J = index("i"), index("j")
IDS = expr.Load(0, (index("b"), I), torch.int64), expr.Load(0, (index("b"), J), torch.int64)


def whole(x: int) -> Int:
    return expr.integer(x)


def chunk(e: Expr, size: int) -> Expr:
    return expr.floordiv(e, whole(size))


CAUSAL = expr.le(J, I)
MASKS: dict[str, Expr] = {
    "chunks": expr.eq(chunk(I, 4), chunk(J, 4)),
    "chunks behind a cache": expr.eq(chunk(I + 6, 4), chunk(J, 4)),
    "causal chunks": expr.logical_and(CAUSAL, expr.eq(chunk(I, 4), chunk(J, 4))),
    "block causal": expr.le(chunk(J, 3), chunk(I, 3)),
    "previous chunk": expr.eq(chunk(J + 1, 3), chunk(I, 3) - 1),
    "prefix": expr.logical_or(CAUSAL, expr.lt(J, whole(5))),
    "sinks and window": expr.logical_and(CAUSAL, expr.logical_or(expr.lt(J, whole(2)), expr.lt(I - J, whole(4)))),
    "dilated": expr.logical_and(CAUSAL, expr.eq(expr.mod(I - J, whole(3)), whole(0)), expr.lt(I - J, whole(9))),
    "global rows": expr.logical_or(expr.lt(I, whole(2)), expr.le(expr.call("abs", I - J), whole(3))),
    "two windows": expr.logical_or(
        expr.logical_and(CAUSAL, expr.lt(I - J, whole(2))), expr.logical_and(expr.le(J, I + 2), expr.lt(I - J, whole(5)))
    ),
    "strides": expr.le(J, I * 2 - 3),
    "pooled keys": expr.le(J * 2 + 1, I),
    "pooled queries": expr.le(J, chunk(I, 2)),
    "diagonal": expr.eq(I + 1, J),
}


def kept(keep: Expr, m: int, n: int) -> torch.Tensor:
    return evaluate(keep, grid_of(1, 1, range(m), range(n), torch.device("cpu")), (), {}).expand(1, 1, m, n)[0, 0]


def proved(keep: Expr, m: int, n: int) -> Facts:
    return prove(keep, sympy.Integer(m), sympy.Integer(n), Ranges())


def enclosed(bounds: Bounds | None, run: range, size: int) -> range:
    """What a kernel visits for a run of positions."""
    if bounds is None:
        return range(size)

    def ends(candidates: Candidates) -> list[int]:
        at = {"first": run[0], "last": run[-1], "": 0}
        return [at[anchor] + int(integer(offset, {FIRST: run[0], LAST: run[-1]})) for anchor, offset in candidates]

    return range(max([0, *ends(bounds.lo)]), min([size, *ends(bounds.hi)]))


def sound(keep: Expr, m: int, n: int) -> None:
    """Nothing that is kept lies outside of what is visited; `full` and `nonempty` are never claimed wrongly."""
    facts, truth = proved(keep, m, n), kept(keep, m, n)
    for bounds, table, size in ((key_bounds(facts), truth, n), (query_bounds(facts), truth.T, m)):
        for first in range(table.shape[0]):
            for last in range(first, table.shape[0]):
                visited = enclosed(bounds, range(first, last + 1), size)
                outside = [x for x in range(size) if x not in visited]
                assert not table[first : last + 1, outside].any(), (str(keep), first, last, visited)
    assert not facts.nonempty or bool(truth.any(1).all())
    assert not facts.full or bool(truth.all())
    claimed = torch.ones_like(truth)
    for term in facts.rest:
        claimed &= kept(term, m, n)
    rows, columns = torch.arange(m)[:, None], torch.arange(n)
    for low in facts.delta_low:
        claimed &= rows - columns >= int(low)
    for high in facts.delta_high:
        claimed &= rows - columns <= int(high)
    for low in facts.key_low:
        claimed &= columns >= int(low)
    for high in facts.key_high:
        claimed &= columns <= int(high)
    assert torch.equal(claimed, truth), "what vanished was not implied"


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_real_code(name: str) -> None:
    for m, n in ((12, 12), (5, 12), (12, 5), (1, 9)):
        sound(MASKS[name], m, n)


VISITED = {"chunks": 4, "causal chunks": 4, "block causal": 12, "prefix": 8, "previous chunk": 3, "two windows": 7}


@pytest.mark.parametrize("name", VISITED)
def test_a_query_visits_few_keys(name: str) -> None:
    bounds = key_bounds(proved(MASKS[name], 12, 12))
    assert bounds is not None
    visited = max(len(enclosed(bounds, range(k, k + 1), 12)) for k in range(8))
    assert visited <= VISITED[name]


def test_a_key_behind_the_prefix_is_seen_by_no_query_before_it() -> None:
    bounds = query_bounds(proved(MASKS["prefix"], 12, 12))
    assert [enclosed(bounds, range(k, k + 1), 12)[0] for k in range(12)] == [0] * 5 + list(range(5, 12))
    assert enclosed(bounds, range(3, 8), 12) == range(12), "a run that begins in the prefix"
    two = expr.logical_or(CAUSAL, expr.lt(J, whole(3)), expr.lt(J, whole(7)))
    assert [enclosed(query_bounds(proved(two, 12, 12)), range(k, k + 1), 12)[0] for k in (6, 7, 11)] == [0, 7, 11]
    sound(two, 12, 12)


@pytest.mark.parametrize("name", ["chunks", "causal chunks", "block causal", "prefix", "sinks and window", "dilated"])
def test_each_query_keeps_its_own_key(name: str) -> None:
    assert proved(MASKS[name], 12, 12).nonempty


def test_a_query_is_in_its_own_document() -> None:
    assert proved(expr.logical_and(CAUSAL, expr.eq(*IDS)), 9, 9).nonempty
    assert not proved(expr.logical_and(expr.lt(J, I), expr.eq(*IDS)), 9, 9).nonempty
    assert not proved(expr.logical_and(CAUSAL, expr.eq(*IDS)), 9, 5).nonempty, "the last queries have no key of their own"


def test_what_others_imply_vanishes() -> None:
    assert proved(expr.logical_and(CAUSAL, expr.le(J, I + 5)), 12, 12).delta_low == (0,)
    assert proved(expr.logical_and(CAUSAL, expr.lt(I - J, whole(12))), 12, 12).delta_high == ()
    assert proved(expr.logical_and(CAUSAL, expr.logical_or(expr.le(J, I + 3), expr.eq(*IDS))), 12, 12).rest == ()
    assert proved(expr.logical_and(CAUSAL, expr.le(J, whole(11))), 12, 12).key_high == ()
    n = sympy.Symbol("n", integer=True, positive=True)
    facts = prove(expr.logical_and(CAUSAL, expr.lt(I - J, Int(n))), n, n, Ranges({n: sympy.Integer(2)}, {}))
    assert facts.causal_offset == 0


def test_an_end_is_an_end_only_where_it_never_falls() -> None:
    s = I.value
    assert rising(Max(3, 2 * s + FloorDiv(s + 1, 4) * 4), s)
    assert rising(Min(s, 7), s)
    assert not rising(Mod(s, 4), s)
    assert not rising(-s, s)
    assert not rising(s - FloorDiv(s, 2), s)
    assert not rising(s * s, s)


def random_mask(rng: random.Random, depth: int) -> Expr:
    if depth and rng.random() < 0.7:
        join = rng.choice((expr.logical_and, expr.logical_or))
        return join(*(random_mask(rng, depth - 1) for _ in range(rng.randint(2, 3))))

    def side(position: Expr) -> Expr:
        shifted = position + rng.randint(-4, 6)
        return rng.choice((shifted, chunk(shifted, rng.choice((2, 3, 4))), expr.mod(shifted, whole(3)), position * 2))

    a, b = side(I), side(J) if rng.random() < 0.8 else whole(rng.randint(0, 9))
    compare = rng.choice((expr.le, expr.lt, expr.ge, expr.eq, expr.ne))
    return compare(a + rng.randint(-2, 2), b)


@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        sound(random_mask(rng, 2), rng.randint(1, 9), rng.randint(1, 9))
