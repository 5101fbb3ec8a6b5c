"""Masks that a module keeps as buffers: read and proved, and noticed when they change; nothing else is ever read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import assert_same, compiled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watched import Watched

import attnfx
from attnfx import exporting
from attnfx.backend import listeners
from attnfx.graphs import buffer_guard
from attnfx.report import Report

SIZE = 24


def tril(diagonal: int = 0) -> Tensor:
    return torch.ones(1, 1, SIZE, SIZE).tril(diagonal)


class Attention(nn.Module):
    """nanoGPT's: two heads of 4 over x (B, S, 8), masked by a table of ones and zeros."""

    def __init__(self, table: Tensor | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("bias", tril() if table is None else table)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(-2, -1)) / math.sqrt(4), v

    def masked(self, scores: Tensor) -> Tensor:
        S = scores.shape[-1]
        return scores.masked_fill(self.bias[:, :, :S, :S] == 0, float("-inf"))

    def forward(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        return x + (self.masked(scores).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Added(Attention):
    """The table is added to the scores."""

    def masked(self, scores: Tensor) -> Tensor:
        S = scores.shape[-1]
        return scores + self.bias[..., :S, :S]


class Kept(Attention):
    """The table is a boolean mask, the fill another buffer."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        self.register_buffer("masked_bias", torch.tensor(-1e9))

    def masked(self, scores: Tensor) -> Tensor:
        S, N = scores.shape[-2:]
        return torch.where(self.bias[:, :, N - S : N, :N], scores, self.masked_bias.to(scores.dtype))


class Placed(Attention):
    """Causal by positions that are kept."""

    def masked(self, scores: Tensor) -> Tensor:
        at = self.bias[0, : scores.shape[-1]]
        return scores.masked_fill(at[None, :] > at[:, None], float("-inf"))


def model(layers: int = 2, make: Callable[[], nn.Module] = Attention) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(make() for _ in range(layers)))


def inputs(length: int = 11) -> Tensor:
    return torch.linspace(-1, 1, 2 * length * 8).view(2, length, 8)


def only(report: Report) -> Any:
    (site,) = report.sites
    return site


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "ones and zeros": Attention,
    "bytes": lambda: Attention(tril().to(torch.uint8)),
    "booleans": lambda: Attention(tril().bool()),
    "half": lambda: Attention(tril().half()),
    "where, the fill a buffer": lambda: Kept(tril().bool()),
    "added -inf": lambda: Added(torch.full((SIZE, SIZE), -math.inf).triu(1)),
    "added -1e9": lambda: Added((1 - tril()) * -1e9),
    "positions": lambda: Placed(torch.arange(SIZE)[None]),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_in_a_buffer_is_causal(name: str) -> None:
    m, x = model(1, CAUSAL[name]), inputs()
    got, report = compiled(m, x)
    assert_same(got, m(x))
    site = only(report)
    assert site.site.is_causal
    assert site.decision == ("vendor" if site.site.fill < -1e30 else "portable")
    assert "causal" in str(site.site)
    assert not site.site.side
    assert "0.bias" in site.buffers
    assert "Read under a guard, compiled anew when changed: 0.bias" in str(report)


def test_a_window_in_a_buffer_is_a_window() -> None:
    band = tril().bool() ^ tril(-5).bool()
    m, x = model(1, lambda: Kept(band)), inputs(19)
    got, report = compiled(m, x)
    assert_same(got, m(x))
    assert "causal ∧ i - j ≤ 4" in str(only(report).site)
    assert not only(report).site.side
    assert only(report).buffers == ("0.bias", "0.masked_bias")


def test_equal_layers_share_a_line() -> None:
    _, report = compiled(model(3), inputs())
    assert str(report).count("Read under a guard") == 1
    assert "[0-2].bias" in str(report)
    assert [s.buffers for s in report.sites] == [("0.bias",), ("1.bias",), ("2.bias",)]


def test_gradients_are_the_models() -> None:
    m, x = model(), inputs()
    parameters = list(m.parameters())
    want = torch.autograd.grad(m(x).square().sum(), parameters)
    got, report = compiled(m, x)
    assert [s.decision for s in report.sites] == ["vendor", "vendor"]
    assert_same(torch.autograd.grad(got.square().sum(), parameters), want, 2e-5)


def test_every_length_runs_the_same_graph() -> None:
    watched = Watched(model(), dynamic=True)
    assert [watched(inputs(length)) for length in (11, 7, 19, SIZE - 1, 5)] == [1] * 5
    assert [s.decision for s in watched.reports[0].sites] == ["vendor", "vendor"]


@torch.no_grad()
def test_a_change_is_noticed() -> None:
    m, x = model(), inputs()
    watched = Watched(m)
    assert watched(x) == watched(x) == 1
    m[0].bias.fill_(1)
    assert watched(x) == watched(x) == 2
    assert [s.site.is_causal for s in watched.reports[1].sites] == [False, True]
    m[0].bias.copy_(tril())
    assert watched(x) == 2, "the first compile holds again"
    m[1].bias = tril(3)
    assert watched(x) == 3
    m[1].bias[0, 0, 5, 2] = 0
    assert watched(x) == 4
    assert watched.reads == ("0.bias",)


@torch.no_grad()
def test_the_same_values_are_no_change() -> None:
    m, x = model(), inputs()
    watched = Watched(m)
    watched(x)
    state = {name: t.clone() for name, t in m.state_dict().items()}
    m.load_state_dict(state)
    assert watched(x) == 1
    m[0].bias = tril()
    assert watched(x) == 1
    m.load_state_dict(state, assign=True)
    assert watched(x) == 1
    m.load_state_dict({**state, "1.bias": tril(2)})
    assert watched(x) == 2


@torch.no_grad()
def test_a_replaced_storage_is_noticed() -> None:
    m, x = model(1), inputs()
    watched = Watched(m)
    watched(x)
    m[0].bias.data = torch.ones_like(m[0].bias)
    assert watched(x) == 2


@torch.no_grad()
def test_a_change_by_a_compiled_function_is_noticed() -> None:
    m, x = model(1), inputs()
    watched = Watched(m)
    watched(x)
    torch.compile(lambda t: t.fill_(1), backend="aot_eager")(m[0].bias)
    assert watched(x) == 2


@torch.no_grad()
def test_a_buffer_with_many_values_becomes_data() -> None:
    m, x = model(1), inputs()
    watched = Watched(m)
    for diagonal in range(10):
        m[0].bias = tril(diagonal)
        watched(x)
    assert len(watched.reports) == buffer_guard.MOST_STRUCTURES + 1
    assert watched.reads == ()


@torch.no_grad()
def test_a_buffer_that_is_always_written_becomes_data() -> None:
    m, x = model(1), inputs()
    watched = Watched(m)
    for _ in range(buffer_guard.MOST_READINGS + 5):
        watched(x)
        m[0].bias.mul_(1)
    assert len(watched.reports) == 2
    assert watched.reads == ()


def test_equal_modules_compiled_one_by_one_share_a_graph() -> None:
    layers, x = model(8), inputs().requires_grad_()
    reports = list[Report]()
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    try:
        want = layers(x)
        for layer in layers:
            layer.compile(backend=attnfx.backend.attnfx, options={"inner": "eager", "strict": True})
        for _ in range(3):
            assert_same(layers(x), want)
    finally:
        listeners.reset(token)
    assert len(reports) <= 2  # the first layer's input is a leaf, the others' are not


def test_the_option_turns_it_off() -> None:
    m, x = model(1), inputs()
    watched = Watched(m, buffers="ignore")
    watched(x)
    m[0].bias.fill_(1)
    assert watched(x) == 1
    assert not only(watched.reports[0]).site.is_causal
    assert watched.reads == ()


def test_an_argument_is_never_read() -> None:
    m = model(1, lambda: Attention(tril()))

    def attend(x: Tensor, table: Tensor) -> Tensor:
        scores, v = m[0].scores(x)
        return scores.masked_fill(table == 0, float("-inf")).softmax(-1) @ v

    watched = Watched(attend)
    assert watched(inputs(), tril()[..., :11, :11]) == 1
    assert watched(inputs(), tril(4)[..., :11, :11].contiguous()) == 1 or len(watched.reports) == 2  # other strides
    assert not any(s.site.is_causal for r in watched.reports for s in r.sites)


@pytest.mark.parametrize("kind", ["parameter", "attribute"])
def test_a_parameter_and_an_attribute_are_never_read(kind: str) -> None:
    m = model(1)
    del m[0].bias
    m[0].bias = nn.Parameter(tril(), requires_grad=False) if kind == "parameter" else tril()
    watched = Watched(m)
    watched(inputs())
    with torch.no_grad():
        m[0].bias.fill_(1)
    assert watched(inputs()) == 1
    assert not only(watched.reports[0]).site.is_causal


class Writes(Attention):
    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        self.bias.mul_(1)
        return found


def test_a_buffer_that_the_graph_writes_is_never_read() -> None:
    watched = Watched(model(1, Writes))
    assert watched(inputs()) == watched(inputs()) == 1
    assert not only(watched.reports[0]).site.is_causal


class Replaces(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.bias = self.bias.roll(1, -1)
        return super().forward(x)


def test_a_buffer_that_the_graph_replaces_is_what_it_is_replaced_by() -> None:
    m, other, x = model(1, Replaces), model(1, Replaces), inputs()
    torch._dynamo.reset()
    run = torch.compile(m, backend="attnfx", options={"inner": "eager", "strict": True})
    for _ in range(4):
        assert_same(run(x), other(x))


@pytest.mark.parametrize("wrong", [(0, 0, 7, 3), (0, 0, 2, 9), (0, 0, SIZE - 1, 1)])
def test_one_wrong_element_is_data(wrong: tuple[int, ...]) -> None:
    table = tril()
    table[wrong] = 1 - table[wrong]
    m, x = model(1, lambda: Attention(table)), inputs(SIZE)
    got, report = compiled(m, x)
    assert_same(got, m(x))
    assert not only(report).site.is_causal
    assert only(report).buffers == ()


def test_inference_tensors_are_never_read() -> None:
    with torch.inference_mode():
        m, x = model(1), inputs()
        got, report = compiled(m, x)
        assert_same(got, m(x))
    assert only(report).buffers == ()


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_buffers_of_checkpointed_layers_are_read() -> None:
    torch.manual_seed(0)
    m, x = Checkpointed(Attention(), Attention()), inputs().requires_grad_()
    watched = Watched(m)
    watched(x)
    assert watched.reads == ("0.bias", "1.bias")
    m[1].bias.fill_(1)
    assert watched(x) == 2


def test_without_a_compile_nothing_is_read() -> None:
    m, x = model(1), inputs()
    rewritten = exporting.rewritten(m, (x,), strict=True)
    assert "attnfx.attention" in rewritten.code
    m[0].bias.fill_(1)
    assert_same(rewritten(x), m(x))


def test_inductor_and_its_caches_hold_the_mask_that_there_was() -> None:
    m, x = model(1), inputs()
    watched = Watched(m, inner="inductor")
    for table in (tril(), torch.ones_like(tril()), tril(2)):
        with torch.no_grad():
            m[0].bias.copy_(table)
        torch._dynamo.reset()
        watched(x)
    assert [only(r).site.is_causal for r in watched.reports] == [True, False, True]


def test_verification_reads_them_too() -> None:
    m, x = model(1), inputs()
    found = attnfx.verify(m, x)
    assert found.worst < 1e-5
    assert only(found.report).buffers == ("0.bias",)
