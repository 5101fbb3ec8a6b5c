"""`model.generate` of unmodified models: the tokens of eager greedy decoding, every attention rewritten, no compile too many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from generation.watch import SINGLE, watched

pytest.importorskip("transformers")
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

PROMPT, TOKENS = 29, 33  # a prefill and 32 steps
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": zoo.VOCABULARY, **SPECIAL,
}  # fmt: skip


def llama(attention: str) -> nn.Module:
    return LlamaForCausalLM._from_config(LlamaConfig(**GROUPED), attn_implementation=attention)


def mistral(attention: str) -> nn.Module:
    return MistralForCausalLM._from_config(MistralConfig(**GROUPED, sliding_window=13), attn_implementation=attention)


def gpt2(attention: str) -> nn.Module:
    config = GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=zoo.VOCABULARY, **SPECIAL)
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def t5(attention: str) -> nn.Module:
    config = zoo._t5_config()
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 0, None
    return T5ForConditionalGeneration._from_config(config, attn_implementation=attention)


def whisper(attention: str) -> nn.Module:
    config = WhisperConfig(
        d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=zoo.VOCABULARY, num_mel_bins=10, max_source_positions=53,
        decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    )  # fmt: skip
    return WhisperForConditionalGeneration._from_config(config, attn_implementation=attention)


@dataclass(frozen=True)
class Generation:
    """A model, how it spells attention, its cache (None: one that grows), which side is padded, and `dynamic` of the compile."""

    make: Callable[[str], nn.Module]
    attention: str = "sdpa"
    cache: str | None = None
    padded: str = ""
    dynamic: bool | None = None

    def __str__(self) -> str:
        parts = (self.make.__name__, self.attention, self.cache or "growing", self.padded and f"{self.padded}-padded")
        return "-".join([*filter(None, parts), *(["dynamic"] if self.dynamic else [])])

    def inputs(self) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(1)
        if self.make is whisper:
            return {"input_features": torch.randn(2, 10, 106, generator=noise)}
        ids = torch.randint(3, zoo.VOCABULARY, (2, PROMPT), generator=noise)
        return {"input_ids": ids, "attention_mask": zoo.padding(2, PROMPT, self.padded)}


CASES = (
    Generation(llama, padded="left"),
    Generation(llama, padded="left", dynamic=True),
    Generation(llama, "eager", "static", padded="left"),
    Generation(mistral),
    Generation(mistral, dynamic=True),
    Generation(mistral, "eager", padded="left"),
    Generation(mistral, "sdpa", "static"),
    Generation(gpt2, padded="left"),
    Generation(gpt2, "eager", "static"),
    Generation(t5, "eager", padded="right"),
    Generation(t5, "eager", "static"),
    Generation(whisper),
    Generation(whisper, "sdpa", "static", dynamic=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_those_of_eager(case: Generation) -> None:
    torch.manual_seed(0)
    model = zoo._lively(case.make(case.attention)).eval()
    eager = model.forward

    def tokens(backend: Any, options: Any) -> Tensor:
        model.forward = torch.compile(eager, backend=backend, options=options, dynamic=case.dynamic) if backend else eager
        chosen = {"cache_implementation": case.cache} if case.cache else {}
        with torch.no_grad():
            found: Tensor = model.generate(
                **case.inputs(), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, disable_compile=True, **chosen
            )
        return found

    plain, mine = watched(tokens, "eager"), watched(tokens)
    assert torch.equal(mine.result, tokens(None, None))
    assert mine.missed <= {SINGLE}
    assert mine.sites >= 4  # prefill and step of two layers
    assert mine.compiles <= plain.compiles
