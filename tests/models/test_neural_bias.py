"""NeuralBias in ESMFold's triangle attention: fitted on its own pair biases, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.esm.modeling_esmfold import EsmFoldTriangleAttention

import attnfx
from attnfx import measure
from attnfx.backend import listeners
from attnfx.biases.fitting import Fitted
from attnfx.biases.pair_file import load
from attnfx.biases.pair_network import factors, features
from attnfx.errors import AttnfxError, PolicyError
from attnfx.report import Report
from attnfx.variants import NeuralBias

CHANNELS, HEADS, TOKENS = 24, 3, 11


class Block(nn.Module):
    """The two triangle attentions of a block of the folding trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.tri_att_start = EsmFoldTriangleAttention(CHANNELS, 16, HEADS)
        self.tri_att_end = EsmFoldTriangleAttention(CHANNELS, 16, HEADS, starting=False)

    def forward(self, pair: Tensor, mask: Tensor | None = None) -> Tensor:
        pair = pair + self.tri_att_start(pair, mask=mask)
        return pair + self.tri_att_end(pair, mask=mask)


def block() -> Block:
    made, noise = Block().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            spread = torch.randn(p.shape, generator=noise)
            p.copy_(1.5 * spread / p.shape[-1] ** 0.5 if p.dim() > 1 else 1 + 0.1 * spread)
    return made


def pairs(seed: int, tokens: int = TOKENS, batch: int = 1) -> Tensor:
    """(P, N, N, C): sums and products of what each token is, of which there are two dimensions."""
    to = torch.randn(2, 2 * CHANNELS, generator=torch.Generator().manual_seed(7))
    a, b = (torch.randn(batch, tokens, 2, generator=torch.Generator().manual_seed(seed)) @ to).tanh().chunk(2, -1)
    return a[:, :, None] + b[:, None] + 0.5 * a[:, :, None] * b[:, None]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    path = tmp_path_factory.mktemp("fitted") / "networks.pt"
    calls = [(pairs(seed),) if seed % 2 else {"pair": pairs(seed)} for seed in range(20)]
    return attnfx.fit_neural_bias(block(), calls, "*tri_att*", path, rank=20, width=48, steps=900)


def run(model: nn.Module, path: str, *args: Any, **options: Any) -> tuple[Any, Report]:
    torch._dynamo.reset()
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    policy = [attnfx.Rule("*tri_att*", NeuralBias(path))]
    try:
        out = attnfx.compile(model, policy, strict=True, **{"inner": "eager", **options})(*args)
    finally:
        listeners.reset(token)
    return out, reports[-1]


def without_bias(model: Block) -> Block:
    with torch.no_grad():
        for attention in (model.tri_att_start, model.tri_att_end):
            attention.linear.weight.zero_()
    return model


def test_the_fit_says_how_good_it_is_on_calls_that_it_did_not_see(fitted: Fitted) -> None:
    assert list(fitted.networks) == ["tri_att_start.mha", "tri_att_end.mha"]
    for network in fitted.networks.values():
        assert (network.heads, network.channels, network.rank) == (HEADS, CHANNELS, 20)
        assert 0 < network.error < 0.25 * network.size
        assert network.error < network.largest
    model, pair = block(), pairs(19)
    x = model.tri_att_start.layer_norm(pair)
    bias = model.tri_att_start.linear(x).permute(0, 3, 1, 2)
    network = fitted.networks["tri_att_start.mha"]
    u, v = factors(network.query, network.key, HEADS, features(x))
    left = (u @ v.mT - (bias - bias.mean(-1, keepdim=True))).square().mean().sqrt()
    assert float(left) < 2 * network.error
    assert f"tri_att_start.mha: error {network.error:.3g}" in str(fitted)


@pytest.mark.parametrize("case", [{}, {"tokens": 17}, {"batch": 3}, {"tokens": 9, "batch": 2}], ids=str)
@torch.no_grad()
def test_the_model_is_much_nearer_than_without_its_biases(fitted: Fitted, case: dict[str, int]) -> None:
    model, pair = block(), pairs(99, **case)
    out, report = run(model, fitted.path, pair)
    want = model(pair)
    error = measure.difference(out, want)
    assert error < 0.35 * measure.difference(without_bias(block())(pair), want)
    for site in report.sites:
        assert (site.exact, site.exactness) == (False, "approximate, needs fitted networks")
        assert site.site.head_dim == 16 + 20
        assert "as 20 columns of queries and keys, from two networks; when fitted, the bias had the root mean" in site.biases[0]
        assert [len(t.shape) for t in site.site.side] == [5], "the mask is read, and the bias is not"
    for name in ("tri_att_start", "tri_att_end"):
        weight = next(line for line in report.after.splitlines() if "def forward" in line).count(f"{name}_modules_linear_")
        assert report.after.count(f"{name}_modules_linear_parameters_weight_") - weight <= 2, "the bias is not computed"


@torch.no_grad()
def test_it_is_the_definition(fitted: Fitted) -> None:
    model, pair = block().tri_att_start.double(), pairs(5).double()
    holder = Alone("tri_att_start", model)
    network, x = fitted.networks["tri_att_start.mha"], model.layer_norm(pair)
    u, v = factors(network.query, network.key, HEADS, features(x))
    q, k, value = model.mha._prep_qkv(x[0], x[0])
    o = NeuralBias(fitted.path).reference(q, k, value, 1.0, factors=(u.double(), v.double()))
    want = model.mha._wrap_up(o.transpose(1, 2), x[0])[None]
    out, _ = run(holder, fitted.path, pair)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_halves(fitted: Fitted) -> None:
    dtype, model, pair = torch.float16, block(), pairs(99)
    wide, _ = run(model, fitted.path, pair)
    out, _ = run(block().to(dtype), fitted.path, pair.to(dtype))
    eager = measure.difference(block().to(dtype)(pair.to(dtype)), model(pair))
    assert measure.difference(out, wide) < 2 * eager
    for network in fitted.networks.values():  # columns in bfloat16 lose far less than the fit did
        layers, query = (list(network.query), list(network.key)), torch.empty(TOKENS, HEADS, TOKENS, 16)
        x = torch.nn.functional.layer_norm(pair, (CHANNELS,))
        u, v = torch.ops.attnfx.pair_columns(x, *layers, torch.ones(HEADS), query)
        ub, vb = torch.ops.attnfx.pair_columns(x, *layers, torch.ones(HEADS), query.bfloat16())
        assert ub.dtype == torch.bfloat16
        assert float((ub.float() @ vb.float().mT - u @ v.mT).square().mean().sqrt()) < 0.02 * network.error


@torch.no_grad()
def test_any_length_and_inductor(fitted: Fitted) -> None:
    torch._dynamo.reset()
    model, policy = block(), [attnfx.Rule("*tri_att*", NeuralBias(fitted.path))]
    compiled = attnfx.compile(model, policy, strict=True, dynamic=True)
    for tokens in (9, 14):
        pair, mask = pairs(3, tokens), torch.ones(1, tokens, tokens)
        mask[..., -2:] = 0
        want, plain = model(pair, mask), without_bias(block())(pair, mask)
        assert measure.difference(compiled(pair, mask), want) < 0.6 * measure.difference(plain, want)


def test_refusals(fitted: Fitted, tmp_path: Path) -> None:
    def refused(model: nn.Module, *args: Any, path: str = fitted.path) -> str:
        with pytest.raises(Exception, match="NeuralBias cannot serve") as raised:
            run(model, path, *args)
        return str(raised.value)

    pair = pairs(1)
    assert "a gradient of it is wanted" in refused(block(), pair)
    with torch.no_grad():
        assert "No such file" in refused(block(), pair, path="nowhere.pt")
        (tmp_path / "other.pt").write_text("no networks")
        assert "holds no fitted networks" in refused(block(), pair, path=str(tmp_path / "other.pt"))
        assert "softplus is no linear projection" in refused(Scaled(), pair)
        moved = Alone("tri_att_other", block().tri_att_start)
        assert 'has no networks for "tri_att_other.mha"; it has some for tri_att_start.mha, tri_att_end' in refused(moved, pair)


class Alone(nn.Module):
    """One attention, under a name."""

    def __init__(self, name: str, attention: nn.Module) -> None:
        super().__init__()
        self.add_module(name, attention)

    def forward(self, pair: Tensor) -> Tensor:
        (attention,) = self.children()
        return attention(pair)  # type: ignore[no-any-return]


class Scaled(Block):
    """The bias goes through a softplus on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.tri_att_start.linear = nn.Sequential(nn.Linear(CHANNELS, HEADS), nn.Softplus())  # type: ignore[assignment]


def test_nothing_to_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttnfxError, match='No attention has a module path like "nothing"'):
        attnfx.fit_neural_bias(block(), [(pairs(0),)], "nothing", tmp_path / "n.pt")
    with pytest.raises(AttnfxError, match="is no linear projection"):
        attnfx.fit_neural_bias(Scaled(), [(pairs(0),)], "tri_att_start*", tmp_path / "n.pt")
    assert not list(tmp_path.iterdir())


def test_a_file_holds_data_only(fitted: Fitted) -> None:
    networks = load(fitted.path)
    assert not isinstance(networks, str)
    for name, network in networks.items():
        for mine, other in zip(network.query, fitted.networks[name].query, strict=True):
            assert torch.equal(mine, other)
    with pytest.raises(PolicyError, match=r"NeuralBias\.path is ''"):
        NeuralBias("")
