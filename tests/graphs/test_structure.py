"""The structure of a tensor: every element of what is found equals the tensor's, and what differs in one element has none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.expr import Call, Expr, Int
from attnfx.graphs import structure
from attnfx.graphs.structure import Affine, Band, fit

I, J = expr.INDEX["i"], expr.INDEX["j"]
FORBIDDEN = torch.finfo(torch.float32).min


def tril(*shape: int, diagonal: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype).tril(diagonal)


TABLES: dict[str, Callable[[], Tensor]] = {
    "causal float": lambda: tril(1, 1, 9, 9),
    "causal bool": lambda: tril(9, 9, dtype=torch.bool),
    "causal bytes": lambda: tril(1, 9, 9, dtype=torch.uint8),
    "future bool": lambda: torch.ones(9, 9, dtype=torch.bool).triu(1),
    "additive -inf": lambda: torch.full((9, 9), -math.inf).triu(1),
    "additive, negative zeros": lambda: (1 - tril(9, 9)) * -10000.0,
    "additive bfloat16": lambda: torch.full((9, 9), FORBIDDEN).triu(1).bfloat16(),
    "window": lambda: tril(1, 1, 9, 9, dtype=torch.bool) ^ tril(1, 1, 9, 9, diagonal=-4, dtype=torch.bool),
    "band, more columns": lambda: tril(5, 9, diagonal=3).triu(-2),
    "band, more rows": lambda: tril(9, 5, diagonal=-1).triu(-3),
    "shifted": lambda: tril(9, 9, diagonal=-3),
    "transposed": lambda: tril(9, 9).t(),
    "not contiguous": lambda: tril(18, 18)[::2, ::2],
    "three-valued steps on one axis": lambda: torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]),
    "positions": lambda: torch.arange(9)[None],
    "positions expanded": lambda: torch.arange(9).expand(3, 9),
    "positions backwards, int32": lambda: torch.arange(9, 0, -1, dtype=torch.int32),
    "relative positions": lambda: torch.arange(5)[:, None] - torch.arange(7),
    "zeros": lambda: torch.zeros(1, 9, dtype=torch.int64),
    "one value in three axes": lambda: torch.full((2, 3, 4), 2.5),
    "a number": lambda: torch.tensor(-1e9),
    "a number in a row": lambda: torch.full((1, 1), -1e4),
    "half infinite": lambda: torch.full((4, 4), math.inf, dtype=torch.float16),
}


def everything(found: structure.Structure, shape: tuple[int, ...]) -> Tensor:
    """All elements of a tensor of sizes ``shape`` that has the structure."""
    names, axes = "bhij"[: len(shape)], torch.meshgrid(*map(torch.arange, shape), indexing="ij") if shape else ()
    grid = dict(zip(names, axes, strict=True)) or {"i": torch.tensor(0)}
    return evaluate(found.element(tuple(map(expr.index, names)), expr.lt), grid, (), {}).expand(shape)


@pytest.mark.parametrize("name", TABLES)
def test_every_element_is_the_tensors(name: str) -> None:
    table = TABLES[name]()
    found = fit(table)
    assert found is not None
    made = everything(found, tuple(table.shape))
    assert torch.equal(made.to(table.dtype), table)
    assert made.dtype == table.dtype or not table.dtype.is_floating_point


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name]().numel() > 1])
def test_one_wrong_element_and_there_is_another_structure_or_none(name: str) -> None:
    table = TABLES[name]()
    right = fit(table)
    for place in range(table.numel()):
        wrong = table.flatten().clone()
        wrong[place] = not wrong[place] if wrong.dtype == torch.bool else 77
        wrong = wrong.view(table.shape)
        found = fit(wrong)
        assert found != right
        if found is not None:  # a corner of a band makes another band
            assert torch.equal(everything(found, tuple(table.shape)).to(wrong.dtype), wrong)


@pytest.mark.parametrize(
    "table",
    [
        torch.full((4, 4), math.nan),
        torch.full((4, 4), math.nan).triu(1),
        torch.randn(5, 5),
        torch.arange(9.0),
        torch.tensor([0, 1, 3, 6]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.eye(4)[[1, 0, 2, 3]],
        torch.ones(2, 3, 3).tril(),
        torch.empty(0, 4),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, 3).to_sparse(),
        torch.tensor([0.0, -0.0, 0.0, -0.0]),
    ],
)
def test_the_rest_has_none(table: Tensor) -> None:
    assert fit(table) is None


def test_zeros_of_both_signs_are_two_values() -> None:
    plain, signed = fit(torch.zeros(3)), fit(-torch.zeros(3))
    assert plain != signed
    assert isinstance(plain, Band)
    assert isinstance(fit(torch.arange(3)), Affine)


def test_a_size_is_no_part_of_it() -> None:
    assert fit(tril(5, 5)) == fit(tril(9, 12)) != fit(tril(9, 12, diagonal=1))


def test_what_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(tril(9, 9)) is not None
    monkeypatch.setattr(structure, "LARGEST", 9 * 9 * 4 - 1)
    assert fit(tril(9, 9)) is None


def test_a_mask_of_a_thousand_positions_is_read_in_milliseconds() -> None:
    table, best = tril(1024, 1024), math.inf
    for _ in range(10):
        start = time.perf_counter()
        assert fit(table) is not None
        best = min(best, time.perf_counter() - start)
    assert best < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.uint8, torch.int64])
def test_a_table_compared_with_a_number_is_its_condition(dtype: torch.dtype) -> None:
    found = fit(tril(4, 4, dtype=dtype))
    assert found is not None
    i, j = expr.index("i"), expr.index("j")
    element = found.element((i, j), expr.lt)
    number = expr.constant(1, dtype) if dtype == torch.bool else expr.integer(1)
    half = expr.constant(0.5, dtype) if dtype.is_floating_point else number
    kept = [expr.eq(element, number), expr.ne(element, expr.integer(0)), expr.cast(element, torch.bool)]
    lost = [expr.ne(element, number), expr.eq(element, expr.integer(0))]
    if dtype != torch.bool:
        kept += [expr.ge(element, half), expr.gt(element, expr.integer(0))]
        lost += [expr.lt(element, half), expr.logical_not(expr.le(half, element))]
        assert expr.gt(element, expr.integer(-3)) == expr.TRUE
    assert [slack(e) for e in kept] == [I - J] * len(kept)
    assert [slack(e) for e in lost] == [J - I - 1] * len(lost)


def slack(e: Expr) -> sympy.Expr:
    """What has to be zero at least for an inequality of integers to hold."""
    assert isinstance(e, Call)
    assert e.op == "le"
    low, high = e.args
    assert isinstance(low, Int)
    assert isinstance(high, Int)
    return sympy.expand(high.value - low.value)
