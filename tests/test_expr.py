"""Constructors of index expressions: what they fold, and that folding never changes a value."""

import math
import random

import pytest
import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of
from attnfx.expr import FALSE, TRUE, Const, Expr, Int, Load, Score, constant, index, integer

I, J, H = index("i"), index("j"), index("h")


def test_integers_are_exact_algebra() -> None:
    assert (I + J) - I == J
    assert expr.le(I, I + 1) == TRUE
    assert expr.lt(I + 1, I) == FALSE
    assert expr.ge(I, J) == expr.le(J, I)
    assert expr.logical_not(expr.le(J, I)) == expr.lt(I, J)


def test_floats_are_left_in_their_order() -> None:
    x = Load(0, (J,), torch.float32)
    one = constant(1.0, torch.float32)
    assert expr.sub(expr.add(x, one), x) != one, "x may be infinite or round the sum"
    assert expr.mul(x, one) == x
    assert expr.logical_not(expr.lt(x, one)) != expr.le(one, x), "x may be NaN"


def test_constants_are_rounded_to_their_dtype() -> None:
    assert constant(0.1, torch.bfloat16) == Const(float(torch.tensor(0.1).bfloat16()), torch.bfloat16)
    assert constant(-1e9, torch.float16) == Const(-math.inf, torch.float16)
    with pytest.raises(ValueError, match="NaN"):
        constant(math.nan, torch.float32)


def test_logic_folds() -> None:
    a, b = expr.le(J, I), Load(0, (J,), torch.bool)
    assert expr.logical_and(a, TRUE, a) == a
    assert expr.logical_and(a, FALSE) == FALSE
    assert expr.logical_or(b, TRUE) == TRUE
    assert expr.ne(expr.cast(b, torch.int64), integer(0)) == b
    assert expr.where(TRUE, I, J) == I
    x, y, z = (Load(n, (J,), torch.float32) for n in range(3))
    before, after = expr.le(J, I), expr.lt(I, J)
    assert expr.where(before, x, expr.where(after, y, z)) == expr.where(before, x, y)
    assert expr.where(before, expr.where(before, x, y), z) == expr.where(before, x, z)
    assert expr.where(before, expr.where(after, x, y), expr.where(before, x, z)) == expr.where(before, y, z)
    assert expr.where(before, x, expr.where(expr.lt(J, I), y, z)) != expr.where(before, x, z)


def test_an_unknown_operation_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown operation 'conv'.*softmax|unknown operation 'conv'.*'where'"):
        expr.call("conv", I)


def test_dependence() -> None:
    assert expr.depends_on(I + H, "h")
    assert not expr.depends_on(I + H, "j")
    assert expr.depends_on(Score(), "j")


def random_expression(rng: random.Random, depth: int) -> Expr:
    """A random integer or boolean formula of i, j, h."""
    if depth == 0:
        return rng.choice([I, J, H, integer(rng.randint(-4, 4))])
    a, b = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    if a.dtype == torch.bool or b.dtype == torch.bool:
        a, b = (x if x.dtype == torch.bool else expr.le(x, integer(1)) for x in (a, b))
        return rng.choice([expr.logical_and, expr.logical_or])(a, rng.choice([b, expr.logical_not(b)]))
    make = rng.choice([expr.add, expr.sub, expr.mul, expr.le, expr.lt, expr.eq, expr.ne, "//", "%"])
    if make == "//":
        return expr.floordiv(a, integer(rng.randint(1, 4)))
    return expr.mod(a, integer(rng.randint(1, 4))) if make == "%" else make(a, b)


def plain(rng: random.Random, depth: int, i: torch.Tensor, j: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The same formula computed by torch: draws from `rng` exactly as `random_expression` does."""
    if depth == 0:
        return rng.choice([i, j, h, torch.tensor(rng.randint(-4, 4))])
    a, b = plain(rng, depth - 1, i, j, h), plain(rng, depth - 1, i, j, h)
    if a.dtype == torch.bool or b.dtype == torch.bool:
        a, b = (x if x.dtype == torch.bool else x <= 1 for x in (a, b))
        return rng.choice([torch.logical_and, torch.logical_or])(a, rng.choice([b, ~b]))
    make = rng.choice([torch.add, torch.sub, torch.mul, torch.le, torch.lt, torch.eq, torch.ne, "//", "%"])
    if make == "//":
        return a // rng.randint(1, 4)
    return a % rng.randint(1, 4) if make == "%" else make(a, b)


@pytest.mark.parametrize("seed", range(150))
def test_random_formulas_have_torchs_values(seed: int) -> None:
    grid = grid_of(1, 3, range(4), range(5), torch.device("cpu"))
    formula = random_expression(random.Random(seed), 3)
    want = plain(random.Random(seed), 3, grid["i"], grid["j"], grid["h"])
    got = evaluate(formula, grid, (), {})
    assert torch.equal(got.expand(1, 3, 4, 5), want.expand(1, 3, 4, 5))


def test_substitution_folds_again() -> None:
    e = expr.le(J, I + Int(index("h").value))
    assert expr.substitute(e, {index("h").value: index("j").value}) == TRUE
