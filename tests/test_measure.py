"""Verification: each rewritten attention beside its original on the real inputs, and what differs is put back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor, nn

import attnfx
from attnfx import backend, measure
from attnfx.errors import AttnfxWarning, VerificationError
from attnfx.policy import Rule
from attnfx.variants import SlidingWindow

SDPA = F.scaled_dot_product_attention


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 2, 9, 4) for _ in range(3))


def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(SDPA(q, k, v, is_causal=True), k, v)


@pytest.fixture
def wrong_first_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """The causal attention is spliced with its keys in the place of its values."""
    whole = backend.caller

    def caller(splicer: Any, decision: Any, device: torch.device) -> Any:
        right = whole(splicer, decision, device)
        return (lambda q, k, v, loads: right(q, k, k, loads)) if decision.site.is_causal else right

    monkeypatch.setattr(backend, "caller", caller)


def test_a_wrong_site_is_put_back_and_the_result_is_right(wrong_first_site: None) -> None:
    args = inputs()
    with pytest.warns(
        AttnfxWarning, match=r"scaled_dot_product_attention in .*test_measure.py.*error 1.*bound 7\.6e-06.*stays as it"
    ):
        got, report = compiled(two, *args, verify="first", strict=False)
    assert_same(got, two(*args))
    assert [s.site.is_causal for s in report.sites] == [False]
    (missed,) = report.missed
    assert missed.reason.startswith("verification: its rewrite differs from the original, error ")


def test_strict_verification_raises_with_the_numbers(wrong_first_site: None) -> None:
    with pytest.raises(Exception, match=r"differs from the original, error .* \(bound 7\.6e-06\)") as raised:
        compiled(two, *inputs(), verify="first", strict=True)
    assert isinstance(raised.value.__cause__ or raised.value, VerificationError) or "VerificationError" in repr(raised.value)


def test_what_is_right_is_measured_and_stays() -> None:
    _, report = compiled(two, *inputs(), verify=True)
    assert len(report.sites) == 2
    for site in report.sites:
        assert site.measured is not None
        assert 0 <= site.measured.error < 1e-6
        assert site.measured.bound == measure.TOLERANCE * torch.finfo(torch.float32).eps
    assert "verified: error" in str(report)
    assert '"bound"' in report.to_json()


def test_inputs_and_random_numbers_are_left_alone() -> None:
    def writes(x: Tensor, count: Tensor) -> Tensor:
        count += 1
        return SDPA(x, x, x) * count + F.dropout(x, 0.5)

    x, count = torch.randn(2, 5, 4), torch.zeros(1)
    torch.manual_seed(3)
    got, _ = compiled(writes, x, count, verify=True)
    torch.manual_seed(3)
    assert_same(got, writes(x, torch.zeros(1)))
    assert count.item() == 1


def test_dropout_and_variants_are_not_judged() -> None:
    def drops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, dropout_p=0.5)

    _, report = compiled(drops, *inputs(), verify=True)
    (site,) = report.sites
    assert site.measured is not None
    assert math.isnan(site.measured.error)
    assert "it drops 0.5 at random" in str(site.measured)
    found = attnfx.verify(nn.Sequential(Windowed()), inputs()[0], policy=[Rule("*", SlidingWindow(window=2))])
    (measured,) = found.sites.values()
    assert measured.bound is None
    assert measured.error > 1e-3


class Windowed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SDPA(x, x, x, is_causal=True)


def test_each_site_is_measured_on_the_model_s_own_values() -> None:
    """An error of an earlier site is not counted again at a later one."""
    model = nn.Sequential(Windowed(), Windowed())
    found = attnfx.verify(model, inputs()[0], policy=[Rule("0", SlidingWindow(window=2))])
    first, second = found.sites.values()
    assert first.error > 1e-3
    assert second.error < 1e-6
    assert found.worst > 1e-3


def test_differences() -> None:
    inf, nan = math.inf, math.nan
    b = torch.tensor([3.0, 4.0, inf, -inf, nan])
    assert measure.difference(b, b) == 0.0
    assert measure.difference(torch.tensor([3.0, 4.5, inf, -inf, nan]), b) == pytest.approx(0.1)
    for wrong in ([3.0, 4.0, inf, inf, nan], [3.0, 4.0, inf, -inf, 0.0], [nan, 4.0, inf, -inf, nan]):
        assert not measure.difference(torch.tensor(wrong), b) <= 1.0
    assert measure.difference(torch.zeros(2), torch.zeros(3)) == inf
    assert measure.difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_copies_share_memory_as_the_inputs_do() -> None:
    base = torch.arange(6.0)
    a, b, n = measure.copied([base[:4], base[2:], 3])
    a[2] = 9.0
    assert b[0] == 9.0
    assert base[2] == 2.0
    assert n == 3
