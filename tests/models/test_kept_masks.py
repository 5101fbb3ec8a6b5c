"""Models that keep their masks as buffers: causal and window, proved from the buffers, with the models' own results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import assert_same, compiled
from torch import Tensor, nn
from transformers import (
    CodeGenConfig,
    CodeGenModel,
    GPTNeoConfig,
    GPTNeoModel,
    ImageGPTConfig,
    ImageGPTModel,
    OpenAIGPTConfig,
    OpenAIGPTModel,
)

WIDTH, LENGTH = 64, 21


def neo() -> nn.Module:
    sizes = {"vocab_size": 59, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": WIDTH}
    return GPTNeoModel(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=7))


def image() -> nn.Module:
    return ImageGPTModel(ImageGPTConfig(vocab_size=59, n_embd=32, n_layer=2, n_head=2, n_positions=WIDTH))


def openai() -> nn.Module:
    return OpenAIGPTModel(OpenAIGPTConfig(vocab_size=59, n_embd=32, n_layer=2, n_head=2, n_positions=WIDTH))


def codegen() -> nn.Module:
    return CodeGenModel(CodeGenConfig(vocab_size=59, n_embd=32, n_layer=2, n_head=4, n_positions=WIDTH, n_ctx=WIDTH, rotary_dim=4))


#: The model, what its two attentions are called, and what runs them.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], tuple[str, str]]] = {
    "GPT-Neo": (neo, ("| causal else", "| causal ∧ i - j ≤ 6 else"), ("vendor", "portable")),
    "ImageGPT": (image, ("| causal else",) * 2, ("vendor",) * 2),
    "OpenAI GPT": (openai, ("| causal else",) * 2, ("portable",) * 2),
    "CodeGen": (codegen, ("| causal else",) * 2, ("vendor",) * 2),
}


def seeded(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().eval(), torch.randint(0, 59, (2, LENGTH))


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_in_a_buffer_is_proved(name: str) -> None:
    make, masks, decisions = MODELS[name]
    model, ids = seeded(make)

    def run(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False)[0] if name != "OpenAI GPT" else model(ids)[0]
        return found

    with torch.no_grad():
        got, report = compiled(run, ids)
        assert_same(got, run(ids), 2e-5)
    assert tuple(site.decision for site in report.sites) == decisions
    for site, mask in zip(report.sites, masks, strict=True):
        assert mask in str(site.site)
        assert not site.site.side
    kept = {name for name, _ in model.named_buffers() if name.endswith("bias")}
    assert {name for site in report.sites for name in site.buffers} == kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["GPT-Neo", "ImageGPT", "OpenAI GPT"])
def test_padding_beside_it_gives_what_the_model_gives(name: str, side: str) -> None:
    model, ids = seeded(MODELS[name][0])
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if side == "left" else slice(LENGTH - 5, LENGTH)] = 0

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = model(ids, attention_mask=mask)[0]
        return found

    with torch.no_grad():
        got, report = compiled(run, ids, mask)
        assert_same(got, run(ids, mask), 2e-5)
    assert len(report.sites) == 2
    assert all(site.buffers for site in report.sites)


def test_gradients_of_gpt_neo_are_the_models() -> None:
    model, ids = seeded(neo)
    parameters = [p for n, p in model.named_parameters() if "attention" in n]

    def run(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False)[0].square().mean()
        return found

    want = torch.autograd.grad(run(ids), parameters)
    got, _ = compiled(run, ids)
    for a, b in zip(torch.autograd.grad(got, parameters), want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
