"""Separation of biases into products: ranks that are known, what is refused, and that the sum is the formula."""

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.algebra import separation as sums
from attnfx.algebra import separation_check
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.separation import Separation, bias_rank, separation
from attnfx.expr import Expr, Load, Score

B, H, I, J = (expr.index(name) for name in "bhij")
F32 = torch.float32


def load(slot: int, *indices: Expr, dtype: torch.dtype = F32) -> Load:
    return Load(slot, indices, dtype)


def real(e: Expr) -> Expr:
    return expr.cast(e, F32)


def apart(slot: int) -> Expr:
    """One coordinate of the query less that of the key, squared."""
    return expr.call("pow", load(slot, B, I) - load(slot + 9, B, J), expr.integer(2))


def cosine(of: Expr, by: float) -> Expr:
    return expr.call("cos", real(of) * by)


def gpsa(side: int) -> Expr:
    n = expr.integer(side)
    dx, dy = expr.mod(J, n) - expr.mod(I, n), expr.floordiv(J, n) - expr.floordiv(I, n)
    return load(0, H) * real(dx) + load(1, H) * real(dy) + load(2, H) * real(dx * dx + dy * dy)


ALIBI = load(0, H) * real(J - I)
RANKS: dict[str, tuple[Expr, int]] = {
    "alibi": (ALIBI, 1),
    "a negative slope, scaled": (-ALIBI * 0.5, 1),
    "row and column": (load(0, H, I) + load(1, H, J), 1),
    "distance in the plane": (load(0, H) * (apart(1) + apart(2)), 3),
    "distance in space": (load(0, H) * (apart(1) + apart(2) + apart(3)), 4),
    "distance, weighed by the query": (load(0, H, I) * (apart(1) + apart(2)), 3),
    "gpsa": (gpsa(14), 3),
    "square of the distance": (real((I - J) * (I - J)), 2),
    "sinusoid": (load(0, H) * cosine(I - J, 0.25), 2),
    "sine": (expr.call("sin", real(I - J) * 0.25 + load(0, H)), 2),
    "transformer-xl": (
        load(0, B, H, I) * cosine(I - J, 1.0)
        + load(1, B, H, I) * expr.call("sin", real(I - J) * 1.0)
        + load(2, B, H, I) * cosine(I - J, 0.01),
        4,
    ),
    "decay": (expr.call("exp", (load(0, B, H, I) - load(1, B, H, J))), 1),
    "rank one in disguise": (real(I * J) + real(I * 2) + real(J * 3) * real(I), 1),
    "rounded for each side": (
        real(expr.cast(load(0, I), torch.bfloat16)) * real(expr.cast(load(0, J), torch.bfloat16)),
        1,
    ),
    "divided by the query": (expr.div(load(0, J), load(1, I)), 1),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks(name: str) -> None:
    e, rank = RANKS[name]
    found = separation(e)
    assert found is not None
    assert found.rank == rank == bias_rank(Score() * 0.5 + e)
    for u, v in found.terms:
        assert not expr.depends_on(u, "j")
        assert not expr.depends_on(v, "i")
    for part, other in ((found.per_key, "i"), (found.row_constant, "j")):
        assert part is None or not expr.depends_on(part, other)


INSEPARABLE = {
    "rounded as one": expr.cast(ALIBI, torch.bfloat16),
    "computed in half precision": expr.call("mul", load(0, H), expr.cast(J - I, torch.bfloat16), dtype=torch.bfloat16),
    "symmetric": load(0, H) * real(expr.call("abs", I - J)),
    "chosen": expr.where(expr.le(J, I), ALIBI, expr.constant(0.0, F32)),
    "table": load(0, I - J),
    "bucket": real(expr.floordiv(I - J, expr.integer(4))),
    "euclidean": expr.call("sqrt", apart(1) + apart(2)),
    "divided by the pair": expr.div(load(0, J), real(I + J)),
    "sine of a product": expr.call("sin", real(I * J)),
    "scores": Score() * 2.0,
}


@pytest.mark.parametrize("name", INSEPARABLE)
def test_what_is_no_sum_of_products_stays(name: str) -> None:
    assert separation(INSEPARABLE[name]) is None


@pytest.mark.parametrize("centre", [0, 50])
def test_the_sum_is_the_formula(centre: int) -> None:
    e = load(0, H) * (real(I * J) * 0.5 + real(J - I)) + cosine(I - J, 0.1)
    found = separation(e, ((I.value, centre), (J.value, centre)))
    assert found is not None
    grid = {"h": torch.arange(2).view(2, 1, 1), "i": torch.arange(101)[:, None], "j": torch.arange(101)}
    slopes = (torch.tensor([0.5, 2.0], dtype=torch.float64),)
    want, got = (evaluate(x, grid, slopes, {}, dtype=torch.float64) for x in (e, found.whole))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_centres_make_positions_half_as_large() -> None:
    grid, ones = {"h": torch.zeros(1, dtype=torch.int64), "j": torch.arange(101)}, (torch.ones(1),)
    for centre, largest in ((0, 100.0), (50, 50.0)):
        found = separation(ALIBI, ((I.value, centre), (J.value, centre)))
        assert found is not None
        assert found.per_key is not None
        assert float(evaluate(found.per_key, grid, ones, {}).abs().max()) == largest


def test_sizes_are_numbers_of_neither_side() -> None:
    s = sympy.Symbol("s0", integer=True, positive=True)
    found = separation(load(0, H) * real(J - I + expr.Int(s)))
    assert found is not None
    assert found.row_constant is not None
    assert s in expr.symbols(found.row_constant)
    assert found.per_key is not None
    assert s not in expr.symbols(found.per_key)


def test_wrong_parts_do_not_agree() -> None:
    found = separation(ALIBI)
    assert found is not None
    assert separation_check.agree(ALIBI, found)
    assert not separation_check.agree(ALIBI, Separation((), found.per_key, None))
    assert not separation_check.agree(ALIBI * 1.0001, found)


def test_a_division_by_what_may_be_zero_is_not_made_up() -> None:
    # Two products of numbers that queries and keys share: one product at most after dividing by one of these numbers.
    e = load(0, H) * load(2, I) * load(3, J) + load(1, H) * load(2, I) * load(4, J)
    found = separation(e)
    assert found is not None
    assert not any(n.op == "div" for pair in found.terms for x in pair for n in expr.walk(x) if isinstance(n, expr.Call))


def test_summands_keep_their_roundings() -> None:
    rounded = expr.cast(expr.add(load(0, I), load(1, J)), torch.bfloat16)
    parts = sums.additive((Score() - real(rounded)) * 0.5 + load(2, J))
    assert parts == ((Score(), 0.5), (expr.cast(rounded, F32), -0.5), (load(2, J), 1.0))
