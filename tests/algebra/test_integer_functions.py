"""Integers known at run time, as torch writes them: brought to what formulas hold, or named, with the values of Python's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor
from torch.utils._sympy import functions
from torch.utils._sympy.functions import FloorDiv, Max, Min

from attnfx.algebra.evaluate import integer
from attnfx.algebra.integer_functions import canonical, foreign
from attnfx.algebra.integers import Ranges, extremum, replace
from attnfx.backend import listeners
from attnfx.report import Report

S, T = (sympy.Symbol(s, integer=True) for s in "st")
SIZES = Ranges({S: sympy.Integer(2), T: sympy.Integer(1)}, {})


def same_values(e: sympy.Expr, meaning: Callable[[int, int], int]) -> None:
    for s, t in itertools.product(range(2, 12), range(1, 12)):
        assert integer(e, {S: s, T: t}) == meaning(s, t)


@pytest.mark.parametrize(
    ("e", "meaning"),
    [
        (functions.CleanDiv(6 * S * T, T), lambda s, t: 6 * s),
        (functions.CleanDiv(S, T), lambda s, t: s // t),
        (functions.ModularIndexing(S + 4 * T, 3, 5), lambda s, t: (s + 4 * t) // 3 % 5),
        (functions.Identity(S) + T, lambda s, t: s + t),
        (functions.PowByNatural(S, 3), lambda s, t: s**3),
        (functions.LShift(S, sympy.Integer(3)), lambda s, t: s << 3),
        (functions.RShift(S, sympy.Integer(1)), lambda s, t: s >> 1),
        (functions.FloorToInt(functions.IntTrueDiv(S - 5, T)), lambda s, t: math.floor((s - 5) / t)),
        (functions.CeilToInt(functions.IntTrueDiv(S - 5, T)), lambda s, t: math.ceil((s - 5) / t)),
        (functions.TruncToInt(functions.IntTrueDiv(S, T)), lambda s, t: int(s / t)),
        (functions.TruncToInt(functions.ToFloat(S)), lambda s, t: s),
        (Max(0, 4 - S), lambda s, t: max(0, 4 - s)),
        (FloorDiv((2 * S - 1) * FloorDiv(S**2, S), S), lambda s, t: 2 * s - 1),
        (Min(S, T, 5) + Max(S, T), lambda s, t: min(s, t, 5) + max(s, t)),
    ],
    ids=lambda e: str(e) if isinstance(e, sympy.Basic) else "",
)
def test_a_function_with_an_equal(e: sympy.Expr, meaning: Callable[[int, int], int]) -> None:
    found = canonical(e, SIZES)
    assert foreign(found) == ""
    same_values(found, meaning)


@pytest.mark.parametrize(
    "e",
    [
        functions.RoundToInt(functions.IntTrueDiv(S, T)),
        functions.Where(sympy.Lt(S, 7), S, T),
        functions.TruncToInt(functions.IntTrueDiv(S - 5, T)),  # towards zero, where the numerator may be negative
        functions.FloorToInt(functions.IntTrueDiv(S, T - 3)),  # the divisor may be 0
        functions.FloorToInt(functions.IntTrueDiv(S**2, T)),  # may round up to an integer
        functions.PowByNatural(2, S),
        S / 2,
        S**T,
    ],
    ids=str,
)
def test_a_function_without_one_is_named(e: sympy.Expr) -> None:
    assert foreign(1 + canonical(3 + e, SIZES)) != ""


def test_what_the_ranges_decide_is_no_choice() -> None:
    assert canonical(Max(0, 1 - S), SIZES) == 0
    below = Ranges({S: sympy.Integer(2), T: sympy.Integer(1)}, {T: S})
    assert sympy.expand(canonical(3 * Max(S + 1, T, 3) + Min(1, T + 2), below) - 3 * S) == 4
    assert canonical(Max(0, 3 - S), SIZES) == Max(0, 3 - S)
    assert extremum(Max, (S, S), SIZES) == S
    assert extremum(Min, (S, S + T), SIZES) == S
    assert replace(Max(S, T), {S: sympy.Integer(0)}, SIZES) == T


def test_bounds_through_choices() -> None:
    assert SIZES.nonnegative(Max(0, T - S) - T + S)
    assert SIZES.nonnegative(Max(S, T) - Min(S, T))
    assert SIZES.nonnegative(T - Min(S, T))
    assert SIZES.minimum(Max(S, T)) == 2
    assert SIZES.minimum(-Min(5, S)) == -5
    assert SIZES.maximum(Min(7, S) + 2) == 9
    assert SIZES.nonnegative(9 - Max(2, Min(7, S), Min(9, T)))
    assert not SIZES.nonnegative(S - Max(S, T))
    assert not SIZES.nonnegative(Min(S, T) - 2)
    assert not SIZES.nonnegative(T * (Max(0, 3 - S) - Max(0, 3 - T)))
    assert SIZES.nonnegative(FloorDiv(Max(S, T), 3))


def test_a_claim_about_choices_is_never_wrong() -> None:
    """Random sums of maxima and minima: whatever is claimed nonnegative is so for every value."""
    import random

    rng, claimed = random.Random(0), 0
    short = Ranges({S: sympy.Integer(0), T: sympy.Integer(0)}, {S: sympy.Integer(6), T: S})
    for _ in range(500):
        a, b, c, d, e, f = (rng.randint(-2, 2) for _ in range(6))
        claim = a * Max(S + b, c * T) + d * Min(S, T + e, 2) + f * T + 3
        if not short.nonnegative(claim):
            continue
        claimed += 1
        assert all(integer(claim, {S: s, T: t}) >= 0 for s in range(7) for t in range(s + 1))
    assert claimed > 30


OFFSETS: dict[str, Callable[[int], int]] = {
    "max": lambda n: max(n - 7, 0),
    "min": lambda n: min(n, 9) - 2,
    "max of min": lambda n: max(min(n - 3, 11), 2),
    "int of a quotient": lambda n: int(n / 2),
    "ceil": lambda n: math.ceil(n / 3),
    "floor": lambda n: math.floor((n - 9) / 4),
    "shift": lambda n: n >> 1,
    "modulo": lambda n: (n - 20) % 7,
    "decided": lambda n: max(1 - n, 0),
}


def operands(queries: int, keys: int) -> list[Tensor]:
    torch.manual_seed(keys)
    made = [torch.randn(2, 2, length, 8) for length in (queries, keys, keys)]
    for t in made:
        torch._dynamo.mark_static(t, 3)
    return made


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_a_mask(name: str) -> None:
    """A mask whose offset is a function of the length, read as a formula, for lengths on both sides of every choice."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, offset = k.shape[2], OFFSETS[name](k.shape[2])
        keep = torch.arange(n) <= torch.arange(q.shape[2])[:, None] + offset
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    lengths = [operands(n - 1, n) for n in (12, 3, 8, 21, 30)]
    reports: list[Report] = []
    torch._dynamo.reset()
    call = torch.compile(attend, backend="attnfx", dynamic=True, options={"inner": "eager", "strict": True})
    token = listeners.set((reports.append,))
    try:
        for given in lengths:
            assert_same(call(*given), attend(*given))
    finally:
        listeners.reset(token)
    assert reports
    for report in reports:
        assert [m.reason for m in report.missed] == []
        (found,) = report.sites
        assert found.site.side == ()
        assert found.site.facts.causal


def test_an_offset_without_a_formula_is_data() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = round(k.shape[2] / 2)
        keep = torch.arange(start, start + q.shape[2])[:, None] >= torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    inputs = operands(6, 13)
    got, report = compiled(attend, *inputs, dynamic=True)
    assert [m.reason for m in report.missed] == []
    assert len(report.sites) == 1
    assert_same(got, attend(*inputs))
