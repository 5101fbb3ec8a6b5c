"""Sinks: column sums without a matrix, the probabilities that calibration and redistribution leave, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from variant_cases import applied, site_of, tensors_of

from attnfx.composing import OnTensors
from attnfx.errors import PolicyError
from attnfx.variants import SinkCalibration, SinkRedistribution, column_sums
from attnfx.variants.base import Example, Variant

N = 24


def probabilities(variant: Variant) -> tuple[Tensor, Tensor]:
    """What keys weigh without the variant and with it, (2, 4, N, N): values are the unit vectors."""
    example = Example(variant, N, N)
    q, k, _ = tensors_of(example, torch.float64)
    site, eye = site_of(example, torch.float64).replace(value_dim=N), torch.eye(N, dtype=torch.float64).expand(2, 2, N, N)
    changed = variant.compose(OnTensors(site, (), q.device, "portable"), q, k, eye)
    return site.reference(q, k, eye), changed


@pytest.mark.parametrize("run", [1, 7, 24, 40])
@pytest.mark.parametrize("queries", [24, 11])
def test_column_sums(queries: int, run: int) -> None:
    example = Example(SinkCalibration(), queries, N)
    q, k, _ = tensors_of(example, torch.float64)
    site = site_of(example, torch.float64)
    eye = torch.eye(N, dtype=torch.float64).expand(2, 2, N, N)
    A = site.replace(value_dim=N).reference(q, k, eye)
    want = torch.stack([part.sum(2) for part in A.split(run, 2)], -1)
    torch.testing.assert_close(column_sums.of_runs(OnTensors(site, (), q.device, "portable"), q, k, run), want)


def test_calibrated_probabilities() -> None:
    variant = SinkCalibration(beta=0.3, threshold=0.1, segment=6)
    A, changed = probabilities(variant)
    torch.testing.assert_close(changed.sum(-1), torch.ones_like(changed[..., 0]))
    found = 0
    for row in range(N):
        until = row // 6 * 6
        for j in range(row + 1):
            column = A[:, :, j:until, j] if j < until else torch.zeros(2, 4, 1)
            sink = (column.mean(2) > 0.1) & (j > 0)
            found += int(sink.sum())
            torch.testing.assert_close(changed[:, :, row, j][sink], 0.3 * A[:, :, row, j][sink])
            more = changed[:, :, row, j] / A[:, :, row, j]
            torch.testing.assert_close(more[~sink], (changed[:, :, row, 0] / A[:, :, row, 0])[~sink])  # all others by one factor
    assert found > 100


def test_a_longer_sequence_changes_nothing_of_its_beginning() -> None:
    variant = SinkCalibration(threshold=0.08, segment=6)
    q, k, v = tensors_of(Example(variant, N, N), torch.float64)
    long = applied(Example(variant, N, N), q, k, v)
    for n in (6, 7, 17):
        short = applied(Example(variant, n, n), q[:, :, :n], k[:, :, :n], v[:, :, :n])
        torch.testing.assert_close(short, long[:, :, :n], rtol=0, atol=1e-12)


def test_redistributed_probabilities() -> None:
    variant = SinkRedistribution((5, 15), (0, 6, 7), p=0.5, rho=0.4)
    A, changed = probabilities(variant)
    torch.testing.assert_close(changed.sum(-1), torch.ones_like(changed[..., 0]))
    image = A[..., 5:15].sum(-1)
    looks = (image >= 0.2) & (A[..., 6:8].sum(-1) <= 0.4 * image)
    looks[:, :, 5:15] = False
    assert 20 < int(looks.sum()) < looks.numel() - 20
    torch.testing.assert_close(changed[~looks], A[~looks])
    before, after = A[looks], changed[looks]
    torch.testing.assert_close(after[:, [0, 6, 7]], 0.5 * before[:, [0, 6, 7]])
    torch.testing.assert_close(after[:, [1, 4, 15, 23]], before[:, [1, 4, 15, 23]])
    kept = [j for j in range(5, 15) if j not in (6, 7)]
    freed = 0.5 * before[:, [0, 6, 7]].sum(-1)
    torch.testing.assert_close(after[:, kept], before[:, kept] * (1 + freed / before[:, kept].sum(-1))[:, None])


def test_found_sinks_are_those_of_the_images_queries() -> None:
    variant = SinkRedistribution((3, 17), threshold=0.1)
    A, changed = probabilities(variant)
    for b in range(2):
        means = torch.stack([A[b, :, max(3, j) : 17, j].mean() for j in range(17)])
        given = SinkRedistribution((3, 17), tuple((means > 0.1).nonzero()[:, 0].tolist()))
        assert given.sinks
        torch.testing.assert_close(probabilities(given)[1][b], changed[b])


def test_refusals() -> None:
    example = Example(SinkCalibration(segment=2), 300, 300)
    site = site_of(example, torch.float32)
    decode = site_of(replace(example, queries=1), torch.float32)
    for variant, where, words in (
        (SinkCalibration(segment=2), site, "128 segments"), (SinkCalibration(heads=(4,)), site, "the site has 4"),
        (SinkCalibration(), site_of(replace(example, causal=False), torch.float32), "is not causal"),
        (SinkCalibration(), site.replace(keys=sympy.Symbol("s0")), "numbers that are known"),
        (SinkRedistribution((0, 301), (0,)), site, "300 keys"), (SinkRedistribution((9, 50)), decode, "first 299 keys"),
    ):  # fmt: skip
        assert any(words in sentence for sentence in variant.objections(where)), words
    assert SinkRedistribution((9, 50), (0, 10)).objections(decode) == ()


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (SinkCalibration, {"beta": 1.5}), (SinkCalibration, {"segment": -1}), (SinkCalibration, {"heads": (-1,)}),
        (SinkRedistribution, {"visual": (4, 4)}), (SinkRedistribution, {"visual": (4, 9), "sinks": (9,)}),
        (SinkRedistribution, {"visual": (4, 9), "rho": 1.0}), (SinkRedistribution, {"visual": (4, 9), "mass": 0.0}),
    ],
)  # fmt: skip
def test_parameters(kind: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=kind.__name__):
        kind(**parameters)
