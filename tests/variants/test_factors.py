"""Factors of a bias: the least rank whose row-centred error is within a tolerance, with every rounding of the columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnfx.biases.factors import Factors, columns, copies, factored


def field(sizes: tuple[int, int], spread: float, heads: int = 1) -> Tensor:
    """(H, N, N): 2 exp(-distance^2 / spread) of the cells of a field."""
    x, y = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
    place = torch.stack([x.flatten(), y.flatten()])
    squared = (place[:, :, None] - place[:, None]).square().sum(0)
    return torch.stack([2 * torch.exp(-squared / (spread * (h + 1))) for h in range(heads)])


def near(size: int = 24) -> Tensor:
    """(1, N, N): 12, and 4 more for the cells of a field that are not far."""
    x = torch.arange(size)
    place = torch.cartesian_prod(x, x)
    distance = (place[:, None] - place).abs().amax(-1)
    return (12.0 + 4.0 * (distance <= 1)).double()[None]


def product(found: Factors, scale: Tensor | None = None) -> Tensor:
    """What the columns add up to, exactly."""
    key = found.key.repeat_interleave(found.query.shape[0] // found.key.shape[0], 0)
    total = found.query.double() @ key.double().mT
    return total if scale is None else total * scale[:, None, None]


def centred(bias: Tensor) -> Tensor:
    return bias - bias.mean(-1, keepdim=True)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, torch.tensor([0.125, -3.0, 90.0], dtype=torch.float64)])
def test_the_errors_are_those_of_the_columns_and_within_the_tolerance(dtype: torch.dtype, scale: Tensor | None) -> None:
    bias = 7 * field((7, 5), 9.0, heads=3) + torch.arange(35)[:, None]
    found = factored(bias, 3, 1e-3, 30, dtype, scale)
    assert found.query.dtype == found.key.dtype == dtype
    assert found.query.shape == (3, 35, columns(found.rank, dtype))
    assert found.query.shape[-1] * dtype.itemsize % 16 == 0
    assert 0 <= found.query.shape[-1] - found.rank * copies(dtype) < 8
    errors = (centred(bias) - product(found, scale)).abs().amax((1, 2))
    torch.testing.assert_close(torch.tensor(found.errors, dtype=torch.float64), errors, rtol=1e-6, atol=1e-9)
    assert float(errors.max()) <= 1e-3
    for head, rank in enumerate(found.ranks):
        one = factored(bias[head : head + 1], 1, 1e-3, rank - 1, dtype, None if scale is None else scale[head : head + 1])
        assert max(one.errors) > 1e-3, "a lower rank is not enough"


def test_each_head_has_its_own_rank_and_constant_rows_have_none() -> None:
    i, j = torch.arange(31, dtype=torch.float64)[:, None], torch.arange(29, dtype=torch.float64)
    heads = [i + 0 * j, 0.1 * j + i, 0.01 * i * j + 0.02 * j.square(), (0.3 * (i - j)).cos()]
    assert factored(torch.stack(heads), 4, 1e-6, 9, torch.float64).ranks == (0, 1, 2, 2)


def test_half_columns_are_high_and_low_parts() -> None:
    """Rounded to bfloat16 as they are, the factors of a large bias are off by more than the bias of a near key."""
    bias = 40 * field((5, 7), 300.0)
    found = factored(bias, 1, 1e-3, 32, torch.bfloat16)
    assert max(found.errors) <= 1e-3
    rough = factored(bias, 1, 0.0, found.rank, torch.float64)
    rounded = rough.query.bfloat16().double() @ rough.key.bfloat16().double().mT
    assert float((centred(bias) - rounded).abs().max()) > 10 * 1e-3


def test_energy_is_no_measure() -> None:
    bias = near()
    values = torch.linalg.svdvals(bias[0]).square()
    assert float(values[0] / values.sum()) > 0.995
    assert factored(bias, 1, 1e-3, 1, torch.float64).errors[0] > 3.5, "nearly all of the bias of near keys is lost"
    assert factored(bias, 1, 1e-3, 32, torch.float64).errors[0] > 1.0
    whole = factored(bias, 1, 1e-3, 576, torch.float64)
    assert whole.errors[0] <= 1e-3
    assert whole.rank > 400


def test_query_heads_of_one_key_head_share_its_factors() -> None:
    bias = field((7, 5), 40.0, heads=4)
    found = factored(bias, 2, 1e-3, 32, torch.float64)
    assert (found.key.shape[0], len(found.ranks), len(found.errors)) == (2, 2, 4)
    assert float((centred(bias) - product(found)).abs().max()) <= 1e-3
    apart = factored(bias, 4, 1e-3, 32, torch.float64)
    assert found.ranks[0] >= max(apart.ranks[:2])


def test_large_matrices_are_iterated() -> None:
    bias = field((17, 19), 60.0)
    found = factored(bias, 1, 1e-3, 36, torch.float64)
    left, values, right = torch.linalg.svd(centred(bias)[0])
    r = found.rank
    best = (left[:, :r] * values[:r]) @ right[:r]
    assert 20 < r < 36
    torch.testing.assert_close(product(found)[0], best, rtol=0, atol=1e-6)


def test_a_bias_that_is_the_same_for_all_keys_needs_nothing() -> None:
    found = factored(torch.randn(2, 9, 1, dtype=torch.float64).expand(2, 9, 11), 1, 1e-12, 4, torch.float32)
    assert (found.ranks, found.query.shape, found.key.shape) == ((0,), (2, 9, 0), (1, 11, 0))
