"""What is proved of a keep predicate, against the predicate itself on every query and key."""

import random

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, index, integer
from attnfx.sites.facts import Facts, prove

I, J = index("i"), index("j")
M, N = (sympy.Symbol(s, integer=True, positive=True) for s in "MN")


def proved(keep: Expr, m: int, n: int) -> Facts:
    return prove(keep, sympy.Integer(m), sympy.Integer(n), Ranges())


def kept(keep: Expr, m: int, n: int) -> torch.Tensor:
    grid = grid_of(1, 1, range(m), range(n), torch.device("cpu"))
    return evaluate(keep, grid, (), {}).expand(1, 1, m, n)[0, 0]


def test_full_causal_window() -> None:
    assert proved(expr.TRUE, 5, 7).full
    causal = proved(expr.le(J, I + 2), 5, 7)
    assert causal.causal_offset == 2
    assert causal.nonempty
    window = proved(expr.logical_and(expr.le(J, I), expr.lt(I - J, integer(4))), 9, 9)
    assert (window.delta_low, window.delta_high, window.nonempty) == ((0,), (3,), True)
    assert window.causal_offset is None


def test_what_always_holds_is_no_bound() -> None:
    facts = proved(expr.logical_and(expr.le(I, integer(8)), expr.le(integer(0), J)), 9, 9)
    assert facts.full


def test_a_causal_offset_that_starves_the_first_query() -> None:
    assert not proved(expr.le(J, I - 1), 5, 5).nonempty
    assert not proved(expr.lt(I - J, integer(3)), 9, 4).nonempty, "the last queries are beyond every key"


def test_symbolic_lengths() -> None:
    facts = prove(expr.le(J, I + expr.Int(N - M)), M, N, Ranges({M: sympy.Integer(1)}, {}))
    assert facts.causal_offset == N - M
    assert not facts.nonempty, "N < M is not excluded"
    assert prove(expr.le(J, I), M, N, Ranges({N: sympy.Integer(1)}, {})).nonempty


def test_data_stays_a_predicate() -> None:
    padding = expr.Load(0, (index("b"), J), torch.bool)
    facts = proved(expr.logical_and(expr.le(J, I), padding), 5, 5)
    assert facts.rest == (padding,)
    assert facts.causal
    assert not facts.nonempty


@pytest.mark.parametrize("seed", range(40))
def test_bounds_are_sound_and_complete(seed: int) -> None:
    """Random conjunctions: bounds and rest together are the predicate, and `nonempty` is never claimed wrongly."""
    rng = random.Random(seed)
    m, n = rng.randint(1, 9), rng.randint(1, 9)
    terms = []
    for _ in range(rng.randint(1, 3)):
        (a, b), c = rng.choice([(1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (2, -1), (1, 1)]), rng.randint(-6, 6)
        terms.append(expr.le(integer(0), I * a + J * b + c))
    keep = expr.logical_and(*terms)
    facts, truth = proved(keep, m, n), kept(keep, m, n)
    rows, columns = torch.arange(m)[:, None], torch.arange(n)[None, :]
    claimed = torch.ones(m, n, dtype=torch.bool)
    for bounds, inside in (
        (facts.delta_low, lambda d: rows - columns >= d),
        (facts.delta_high, lambda d: rows - columns <= d),
        (facts.key_low, lambda d: columns >= d),
        (facts.key_high, lambda d: columns <= d),
    ):
        for bound in bounds:
            claimed &= inside(int(bound))
    for term in facts.rest:
        claimed &= kept(term, m, n)
    assert torch.equal(claimed, truth)
    if facts.nonempty:
        assert truth.any(1).all()
