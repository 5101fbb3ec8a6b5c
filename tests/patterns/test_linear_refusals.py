"""What is nearly linear attention: it stays as the model computes it, with the reason, or runs with the model's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import compiled
from linear_spellings import SPELLINGS
from torch import Tensor

import attnfx.decide
import attnfx.linear_sites
from attnfx.linear_sites import served
from attnfx.lowering.linear import plan

N = 80
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def lag() -> Tensor:
    return (torch.arange(N)[:, None] - torch.arange(N)).double()


def behind() -> Tensor:
    return lag().clamp(min=0)


def t(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def operands() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, N, 8, dtype=torch.float64, generator=g).requires_grad_() for _ in range(3)]


def same(function: Callable[..., Tensor], args: list[Any], **options: Any) -> Any:
    """The report, after ours and eager's values and gradients were found to be the same."""
    got, report = compiled(function, *args, **options)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    want = function(*args)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want)
    found = [torch.autograd.grad(out, leaves, g, allow_unused=True) for out in (got, want)]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(*found, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-9)
    return report


MASK, FACTOR = "The mask is not plainly causal", "query and key together that is no power of their distance"
DIVISOR = "another formula of the sum of the weights than the sum"


def _w(q: Tensor, k: Tensor) -> Tensor:
    return (F.elu(q) + 1) @ t(F.elu(k) + 1)


REFUSED: dict[str, tuple[Function, str]] = {
    "before itself": (lambda q, k, v: (q @ t(k)).tril(-1) @ v, MASK),
    "one ahead": (lambda q, k, v: (q @ t(k)).tril(1) @ v, MASK),
    "window": (lambda q, k, v: (q @ t(k)).tril().triu(-5) @ v, MASK),
    "anticausal": (lambda q, k, v: (q @ t(k)).triu() @ v, MASK),
    "aligned at the first key": (lambda q, k, v: (q[:, :, :70] @ t(k)).tril() @ v, MASK),
    "a mask of data": (lambda q, k, v: ((q @ t(k)) * (v[0, 0, 0, :1] < lag())) @ v, MASK),
    "decay to both sides": (lambda q, k, v: ((q @ t(k)) * 0.9 ** lag().abs().double()) @ v, FACTOR),
    "decay of every other step": (lambda q, k, v: ((q @ t(k)) * 0.9 ** (behind() // 2)).tril() @ v, FACTOR),
    "decay from one": (lambda q, k, v: ((q @ t(k)) * 0.9 ** (behind() + 1)).tril() @ v, FACTOR),
    "polynomial decay": (lambda q, k, v: ((q @ t(k)) / (behind() + 1)).tril() @ v, FACTOR),
    "gates": (
        lambda q, k, v: ((q @ t(k)) * (k[..., :1].cumsum(2) - t(k[..., :1].cumsum(2))).exp()).tril() @ v,
        "Its decay depends on the data of queries and keys",
    ),
    "a learned decay": (
        lambda q, k, v: ((q @ t(k)) * torch.exp(-F.softplus(v[0, :, :1, :1]) * behind())).tril() @ v,
        "Its decay is learned, and a state has no gradient for it.",
    ),
    "a base of data": (
        lambda q, k, v: ((q @ t(k)) * v[0, :, :1, :1].sigmoid() ** behind()).tril() @ v,
        "The base of its decay is not known when the graph is compiled",
    ),
    "squares": (lambda q, k, v: ((q @ t(k)) ** 2).tril() @ v, "no multiple of the product of queries and keys"),
    "relu of scores": (lambda q, k, v: F.relu(q @ t(k)).tril() @ v, "no multiple of the product of queries and keys"),
    "magnitudes": (
        lambda q, k, v: (lambda w: w / w.abs().sum(-1, keepdim=True))((q @ t(k)).tril()) @ v,
        "the sum of the magnitudes of the weights, which no state keeps",
    ),
    "eps by the query": (
        lambda q, k, v: (lambda w: w @ v / (w.sum(-1, keepdim=True) + 1e-2 * q.exp().sum(-1, keepdim=True)))(_w(q, k).tril()),
        DIVISOR,
    ),
    "between two numbers": (lambda q, k, v: (lambda w: w @ v / w.sum(-1, keepdim=True).clamp(1, 20))(_w(q, k).tril()), DIVISOR),
    "twice the sum": (lambda q, k, v: (lambda w: w @ v / (2 * w.sum(-1, keepdim=True) + 1))(_w(q, k).tril()), DIVISOR),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_state_computes_is_kept(name: str) -> None:
    function, sentence = REFUSED[name]
    report = same(function, operands())
    assert [s.decision for s in report.sites] == ["kept"]
    assert "left as the model computes it. " in report.sites[0].reason
    assert sentence in report.sites[0].reason


# Gradients that the model stops ------------------------------------------------------------------------------------------


def scores_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        w = (q @ t(k)).tril()
    return w @ v


def keys_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = F.relu(k) * 0.5
    return (F.relu(q) @ t(k)).tril() @ v


def cast_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.float()
    return (q @ t(k.double())).tril() @ v


def sum_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = _w(q, k).tril()
    with torch.no_grad():
        l = w.sum(-1, keepdim=True) + 1e-3
    return w @ v / l


def detached_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ t(k)).tril()
    return w / w.detach().sum(-1, keepdim=True).abs().clamp(min=1) @ v


def sum_without_gradient_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.relu(q), F.relu(k)
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    l = torch.einsum("bhnd,bhnd->bhn", q, k.detach().cumsum(2)) + 1e-3
    return torch.einsum("bhnd,bhnde->bhne", q, state) / l[..., None]


def factor_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c = k[..., 0].sigmoid()
    return ((q @ t(k)) * c.detach()[..., None] * c[:, :, None, :]).tril() @ v


STOPPED = [
    scores_without_gradient, keys_without_gradient, cast_without_gradient, sum_without_gradient, detached_sum,
    sum_without_gradient_of_keys, factor_without_gradient,
]  # fmt: skip


@pytest.mark.parametrize("function", STOPPED, ids=lambda f: f.__name__)
def test_gradients_stop_where_the_model_stops_them(function: Function) -> None:
    report = same(function, operands())
    assert [s.decision for s in report.sites] == ([] if function is scores_without_gradient else ["linear"])


# Whatever is spelled -----------------------------------------------------------------------------------------------------

SERVED: dict[str, Function] = {
    "last queries": lambda q, k, v: (q[:, :, :70] @ t(k)).tril(N - 70) @ v,
    "two decays": lambda q, k, v: ((q @ t(k)) * 0.9 ** behind() * torch.exp(-0.1 * behind()) / (behind()[:, :1] + 1)).tril() @ v,
    "growth": lambda q, k, v: ((q @ t(k)) * 1.03 ** behind()).tril() @ v,
    "negative": lambda q, k, v: (-(q @ t(k))).tril() @ v,
    "at least": lambda q, k, v: (lambda w: w @ v / torch.maximum(w.sum(-1, keepdim=True), torch.tensor(5.0).double()))(_w(q, k)),
    "weights of keys": lambda q, k, v: ((q @ t(k)) * torch.where(v[..., 0] > 0, 1.0, 0.25)[:, :, None, :]).tril() @ v,
    "read again": lambda q, k, v: (lambda w: w @ v + w.sum())((q @ t(k)).tril()),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_a_state_computes_is_computed(name: str) -> None:
    report = same(SERVED[name], operands())
    assert [s.decision for s in report.sites] == ["linear"]


LINEAR = [n for n, s in SPELLINGS.items() if "·k" in s.formula or "·(" in s.formula]


@pytest.mark.parametrize("name", LINEAR)
def test_spellings_that_are_left_would_be_computed_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of whatever is linear attention, taken although sums over the keys stand first or tokens are few."""
    monkeypatch.setattr(attnfx.linear_sites, "FEW", 0)
    monkeypatch.setattr(attnfx.decide, "served", lambda site, form, values=None: served(site, "running", values))
    args = [a.requires_grad_() if a.is_floating_point() and n < 3 else a for n, a in enumerate(SPELLINGS[name].arguments())]
    report = same(SPELLINGS[name].function, args)
    lowered = isinstance(plan.linear_plan(report.sites[0].site), tuple)
    assert [s.decision for s in report.sites] == ["linear" if lowered else "kept"]
