"""A loop of decoding steps over a cache that grows: attnfx compiles no more graphs than another backend would be given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from generation.caches import HEAD_DIM, KEY_HEADS, WIDTH, Concatenated, made
from generation.test_tokens import llama, mistral
from generation.watch import watched

pytest.importorskip("transformers")
from transformers import DynamicCache

LAYERS = 2
#: Prompts and the steps after each. A window of 13 is crossed by the steps after 7 tokens, and by the prompt of 300.
PROMPTS = ((1, 3), (2, 3), (7, 9), (300, 2))
#: Keys that a cache holds already when steps begin.
FILLED = (31, 4093)


def conversations(model: nn.Module, call: Callable[..., Any]) -> Iterator[Tensor]:
    """The logits of every call: prompts with their steps, then steps that begin with a long cache."""
    noise = torch.Generator().manual_seed(1)

    def step(length: int, cache: DynamicCache) -> Tensor:
        ids = torch.randint(3, zoo.VOCABULARY, (2, length), generator=noise)
        logits: Tensor = call(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits

    for prompt, steps in PROMPTS:
        cache = DynamicCache(config=model.config)
        for length in (prompt, *[1] * steps):
            yield step(length, cache)
    config = model.config
    for filled in FILLED:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            shape = (2, config.num_key_value_heads, filled, config.hidden_size // config.num_attention_heads)
            cache.update(torch.randn(shape, generator=noise), torch.randn(shape, generator=noise), layer)
        for length in (1, 1, 1, 5):  # up to 4096 keys, and past them
            yield step(length, cache)


@pytest.mark.parametrize(
    ("make", "dynamic"),
    [(llama, True), (mistral, True), (mistral, None)],
    ids=["llama-dynamic", "mistral-dynamic", "mistral-automatic"],
)
def test_growing_cache(make: Callable[[str], nn.Module], dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = zoo._lively(make("sdpa")).eval()

    def logits(backend: Any, options: Any) -> list[Tensor]:
        call = torch.compile(model, backend=backend, options=options, dynamic=dynamic)
        with torch.no_grad():
            return list(conversations(model, call))

    plain, mine = watched(logits, "eager"), watched(logits)
    with torch.no_grad():
        expected = list(conversations(model, model))
    torch.testing.assert_close(mine.result, expected, rtol=2e-5, atol=2e-5)
    assert mine.missed == frozenset()
    assert mine.sites == LAYERS * mine.compiles
    assert mine.compiles <= plain.compiles < torch._dynamo.config.recompile_limit + 1


@pytest.mark.parametrize("spelled", ["sdpa", "softmax"])
def test_handwritten_cache(spelled: str) -> None:
    """Prompts of several lengths, each followed by steps, in one compile; a prompt of one token onto nothing has one key."""
    module = made(Concatenated, spelled)
    x = torch.randn(2, 300, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = (2, 1, 1, 300, 1, 1, 7, *[1] * 9)

    def run(call: Callable[..., Any]) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for start in (0, 1, 5, 4093):
                state = torch.zeros(2, KEY_HEADS, start, HEAD_DIM), torch.zeros(2, KEY_HEADS, start, HEAD_DIM)
                for length in lengths:
                    out, state = call(x[:, :length], state)
                    found.append(out)
        return found

    def compiled(backend: Any, options: Any) -> list[Tensor]:
        return run(torch.compile(module, backend=backend, options=options, dynamic=True))

    plain, mine = watched(compiled, "eager"), watched(compiled)
    torch.testing.assert_close(mine.result, run(module), rtol=1e-5, atol=1e-5)
    assert mine.missed == frozenset()
    assert mine.sites == mine.compiles <= plain.compiles
