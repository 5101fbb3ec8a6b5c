"""Integer algebra against Python's own integers, by brute force over small ranges."""

import itertools
import random

import pytest
import sympy

from attnfx.algebra.evaluate import integer
from attnfx.algebra.integers import FloorDiv, Mod, Ranges, floordiv, modulo, recombined, replace

A, B, C = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "abc")
N = sympy.Symbol("N", integer=True, positive=True)


def values(e: sympy.Expr, **numbers: int) -> int:
    return integer(e, {s: numbers[str(s)] for s in e.free_symbols})


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 8])
def test_division_of_random_polynomials(divisor: int) -> None:
    rng = random.Random(divisor)
    for _ in range(60):
        x, y, z = (rng.randint(-9, 9) for _ in range(3))
        e = x * A + y * B + z
        quotient, remainder = floordiv(e, sympy.Integer(divisor)), modulo(e, sympy.Integer(divisor))
        for a, b in itertools.product(range(6), repeat=2):
            whole = x * a + y * b + z
            assert values(quotient, a=a, b=b) == whole // divisor
            assert values(remainder, a=a, b=b) == whole % divisor


def test_a_remainder_in_range_vanishes() -> None:
    ranges = Ranges({}, {B: N - 1})
    assert floordiv(A * N + B, N, ranges) == A
    assert modulo(A * N + B, N, ranges) == B
    assert floordiv(A * N + B, N).has(B), "without the range nothing may be dropped"


def test_replace_simplifies_on_the_way_up() -> None:
    ranges = Ranges({}, {B: sympy.Integer(3)})
    assert replace(floordiv(C, sympy.Integer(4)), {C: 4 * A + B}, ranges) == A
    assert replace(modulo(C, sympy.Integer(4)), {C: 4 * A + B}, ranges) == B
    assert replace(3 * B + C, {B: FloorDiv(A, 3), C: Mod(A, 3)}) == A
    assert replace(6 * N + 2 * B + C, {B: FloorDiv(A, 3), C: Mod(A, 3)}) == 6 * N + 2 * FloorDiv(A, 3) + Mod(A, 3)


def test_bounds_hold_and_are_found() -> None:
    ranges = Ranges({N: sympy.Integer(2)}, {A: N - 1, B: N - 1})
    assert ranges.nonnegative(N - 1 - A)
    assert ranges.nonnegative(2 * N - 2 - A - B)
    assert not ranges.nonnegative(A - B)
    assert not ranges.nonnegative(N - 3 - A)
    assert ranges.minimum(N - 2) == 0
    assert ranges.nonnegative(floordiv(A, sympy.Integer(3)))
    assert ranges.nonnegative(2 - modulo(A, sympy.Integer(3)))
    short = Ranges({}, {A: sympy.Integer(7)})
    assert short.maximum(floordiv(A, sympy.Integer(3))) == 2
    assert short.maximum(5 - 2 * floordiv(A, sympy.Integer(3)) + floordiv(A, sympy.Integer(4))) >= 5


def test_a_claimed_bound_is_never_wrong() -> None:
    """Random affine forms: whatever is claimed nonnegative is so for every value in range."""
    rng, claimed = random.Random(0), 0
    ranges = Ranges({N: sympy.Integer(1)}, {A: N - 1, B: N - 1})
    for _ in range(400):
        w, x, y, z = (rng.randint(-3, 3) for _ in range(4))
        if not ranges.nonnegative(w * N + x * A + y * B + z):
            continue
        claimed += 1
        for n in range(1, 6):
            assert all(w * n + x * a + y * b + z >= 0 for a in range(n) for b in range(n))
    assert claimed > 20


def test_recombined_puts_digits_together() -> None:
    x, n = sympy.symbols("x n", integer=True, nonnegative=True)
    digits = 16 * FloorDiv(x, 16) + 4 * Mod(FloorDiv(x, 4), 4) + Mod(x, 4)
    assert recombined(n * digits + n) == n * x + n
    assert recombined(3 * FloorDiv(x, 4) + Mod(x, 4)) == 3 * FloorDiv(x, 4) + Mod(x, 4)
