"""Products of queries with embeddings of distances are bands, in every spelling; what is none stays data, and exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from band_spellings import SPELLINGS, Spelling, gathered, heads, later, padded, weighted
from graphs import assert_same, compiled
from torch import Tensor
from torch.nn import functional

from attnfx.report import Report
from attnfx.sites.band import Band


def compared(model: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> Report:
    """The report; the output and every gradient are eager's."""
    got, report = compiled(model, *tensors, **options)
    want, leaves = model(*tensors), [t for t in tensors if t.requires_grad]
    assert_same(got, want, 1e-11)
    if leaves:
        grad = torch.randn_like(want)
        assert_same(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), 1e-11)
    assert len(report.sites) == 1, [m.reason for m in report.missed]
    return report


def band_of(report: Report) -> Band | None:
    site = report.sites[0].site
    assert site is not None
    return site.band


@pytest.mark.parametrize("n", [2, 3, 13, 150])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_a_band_and_trains(name: str, n: int) -> None:
    spelling = SPELLINGS[name]
    report = compared(spelling.model, spelling.tensors(n))
    if n > 2:
        band = band_of(report)
        assert band is not None
        assert (band.left is not None) == spelling.left
        assert any("vector of a distance" in line for line in report.sites[0].biases)


@pytest.mark.parametrize("name", ["padded", "with memory", "both ways", "gathered"])
def test_nothing_of_queries_times_keys_is_left_in_the_graph(name: str) -> None:
    n = 40
    tensors = [t.detach() for t in SPELLINGS[name].tensors(n)]
    reports: list[torch.fx.GraphModule] = []
    compiled(SPELLINGS[name].model, *tensors, inner=lambda gm, inputs: reports.append(gm) or gm.forward)
    sizes = [getattr(node.meta.get("example_value"), "shape", ()) for node in reports[0].graph.nodes]
    assert not [shape for shape in sizes if sum(int(x) >= n for x in shape) > 1]


@pytest.mark.parametrize("name", ["padded", "with memory", "both ways", "gathered"])
def test_lengths_known_at_run_time(name: str) -> None:
    axis = {"with memory": 0, "both ways": 1}.get(name, 2)

    def model(q: Tensor, *others: Tensor) -> Tensor:
        n = q.shape[axis]
        k, v = (torch.cat([t.narrow(axis, 0, 3), t], axis) if axis == 0 else t for t in (q * 2, q - 1))
        sizes = {"padded": (2, 0, n), "with memory": (0, 0, n + 3), "both ways": (1, 50 - n, 2 * n - 1), "gathered": (2, 0, 61)}
        dim, start, length = sizes[name]
        return SPELLINGS[name].model(q, k, v, others[0].narrow(dim - (axis == 2) * 2, start, length), *others[1:])

    for n in (9, 14):
        q, _, _, *others = (t.detach() for t in SPELLINGS[name].tensors(n))
        shape = list(others[0].shape)
        shape[{"with memory": 0, "both ways": 1}.get(name, 0)] = 120
        others[0] = torch.randn(shape, dtype=torch.float64)
        torch._dynamo.mark_dynamic(q, axis)
        got, report = compiled(model, q, *others)
        assert_same(got, model(q, *others), 1e-11)
        site = report.sites[0].site
        assert site is not None
        assert site.queries.is_Symbol
        assert site.band is not None


@pytest.mark.parametrize("name", SPELLINGS)
def test_half_precision_is_as_near_to_exact_as_eager(name: str) -> None:
    spelling = SPELLINGS[name]
    tensors = [t.detach() for t in spelling.tensors(21, torch.float32)]
    wide = [t.double() if t.is_floating_point() else t for t in (x.bfloat16() if x.is_floating_point() else x for x in tensors)]
    half = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
    exact = spelling.model(*wide)
    got, report = compiled(spelling.model, *half)
    assert band_of(report) is not None
    eager = float((spelling.model(*half).double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 1.5 * eager + 2**-9 * float(exact.abs().max())


def test_queries_that_are_scaled_before_are_shared() -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return gathered(q * 0.3, k, v, table)

    band = band_of(compared(scaled, Spelling(scaled, lambda n: heads(n, 2 * n)).tensors(11)))
    assert band is not None
    assert band.left is None
    assert band.factor == pytest.approx(1.0)


def test_a_softcap_around_both_products() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        n = q.shape[2]
        about = (q @ table.T).gather(-1, (torch.arange(n)[:, None] - torch.arange(n) + n - 1).expand(*q.shape[:2], n, n))
        return weighted(3.0 * torch.tanh((q @ k.transpose(-1, -2) + 0.5 * about) / 3.0), v)

    band = band_of(compared(capped, Spelling(capped, lambda n: heads(n, 2 * n - 1)).tensors(12)))
    assert band is not None
    assert band.factor == 0.5


def unmasked(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The products of other queries above the diagonal are seen."""
    b, h, n, _ = q.shape
    return weighted(q @ k.transpose(-1, -2) + functional.pad(q @ table.T, (1, 0)).view(b, h, n + 1, n)[:, :, 1:], v)


def softly_masked(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """They are seen beside a number that is added, and not low enough to hide them."""
    b, h, n, _ = q.shape
    about = functional.pad(q @ table.T, (1, 0)).view(b, h, n + 1, n)[:, :, 1:]
    return weighted(q @ k.transpose(-1, -2) + about + torch.where(later(n), -1e9, 0.0), v)


def of_places(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Vectors of something else than distances."""
    n = q.shape[2]
    at = (torch.arange(n)[:, None] + torch.arange(n)) % n
    return weighted(q @ k.transpose(-1, -2) + (q @ table.T).gather(-1, at.expand(*q.shape[:2], n, n)), v)


def of_keys(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Vectors that the keys multiply."""
    n = q.shape[2]
    at = (torch.arange(n)[:, None] - torch.arange(n) + n - 1).expand(*q.shape[:2], n, n)
    return weighted(q @ k.transpose(-1, -2) + (k @ table.T).gather(-1, at).transpose(-1, -2), v)


def outside_of_the_cap(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    n = q.shape[2]
    at = (torch.arange(n)[:, None] - torch.arange(n) + n - 1).expand(*q.shape[:2], n, n)
    return weighted(torch.tanh(q @ k.transpose(-1, -2)) + (q @ table.T).gather(-1, at), v)


def twice(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The scores are read without the product, too."""
    n = q.shape[2]
    at = (torch.arange(n)[:, None] - torch.arange(n) + n - 1).expand(*q.shape[:2], n, n)
    scores = q @ k.transpose(-1, -2)
    return weighted(torch.where(later(n), scores, scores + (q @ table.T).gather(-1, at)), v)


def beside_a_cap(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A part of the scores is without the product."""
    n = q.shape[2]
    at = (torch.arange(n)[:, None] - torch.arange(n) + n - 1).expand(*q.shape[:2], n, n)
    scores = q @ k.transpose(-1, -2)
    return weighted(torch.tanh(scores) + scores + (q @ table.T).gather(-1, at), v)


@pytest.mark.parametrize("model", [unmasked, softly_masked, of_places, of_keys, outside_of_the_cap, twice, beside_a_cap])
def test_what_is_no_band_is_data(model: Callable[..., Tensor]) -> None:
    n = 12
    rows = n if model in (unmasked, softly_masked, of_places) else 2 * n - 1
    tensors = Spelling(model, lambda n: heads(n, rows)).tensors(n)
    tensors = [t.detach() for t in tensors] if model in (twice, beside_a_cap) else tensors
    assert band_of(compared(model, tensors)) is None


def test_a_low_number_hides_what_it_is_added_to() -> None:
    def hopeless(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        b, h, n, _ = q.shape
        about = functional.pad(q @ table.T, (1, 0)).view(b, h, n + 1, n)[:, :, 1:]
        return weighted(q @ k.transpose(-1, -2) + about + torch.where(later(n), -math.inf, 0.0), v)

    assert band_of(compared(hopeless, Spelling(hopeless, lambda n: heads(n, n)).tensors(12))) is not None


def test_no_gradient_flows_where_the_model_sends_none() -> None:
    def detached(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return padded(q, k, v, table.detach() * 2)

    tensors = Spelling(detached, lambda n: heads(n, n)).tensors(9)
    got, report = compiled(detached, *tensors)
    grads = torch.autograd.grad(got.sum(), tensors, allow_unused=True)
    assert band_of(report) is not None
    assert grads[3] is None
    assert_same(grads[:3], torch.autograd.grad(detached(*tensors).sum(), tensors[:3]), 1e-11)
