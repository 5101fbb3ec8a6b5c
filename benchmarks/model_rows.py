"""The models of `benchmarks.models`: unmodified classes of transformers at real widths, two layers deep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import BloomConfig, BloomModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

Inputs = dict[str, object]
VOCABULARY = 1000


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` is the speed against torch.compile's default that we hold ourselves to."""

    name: str
    title: str
    make: Callable[[Row], nn.Module]
    length: int
    training: bool = False
    mask_of_ones: bool = False
    patchable: bool = False  # whether the causal mask can be patched away by hand, for comparison
    cold: bool = False  # compile with empty caches: the row that first-call seconds are quoted from
    target: float | None = None
    quick: bool = False

    def build(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
        """The model on the device, seeded, and the keyword arguments of one forward."""
        torch.manual_seed(0)
        with torch.device(device):
            model = self.make(self).to(dtype).train(self.training)
            ids = torch.randint(0, VOCABULARY, (1, self.length))
        given: Inputs = {"input_ids": ids}
        if not isinstance(model, T5EncoderModel):
            given["use_cache"] = False
        if self.mask_of_ones:
            given["attention_mask"] = torch.ones_like(ids)
        return model, given


def rows(quick: bool) -> list[Row]:
    """All rows; with `quick` the same ones small enough for a CPU."""
    return [replace(row, length=max(96, row.length // 64), quick=True) if quick else row for row in _ROWS]


def _llama(row: Row, attention: str = "sdpa") -> nn.Module:
    width: dict[str, Any] = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    if row.quick:
        width = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**width, num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=row.length)
    make: Any = LlamaModel._from_config
    model: nn.Module = make(config, attn_implementation=attention)
    return model


def _llama_eager(row: Row) -> nn.Module:
    return _llama(row, "eager")


def _bloom(row: Row) -> nn.Module:
    hidden, heads = (64, 4) if row.quick else (4096, 32)
    config = BloomConfig(
        hidden_size=hidden, n_layer=2, n_head=heads, vocab_size=VOCABULARY, hidden_dropout=0.0, attention_dropout=0.0
    )
    return BloomModel(config)


def _t5(row: Row) -> nn.Module:
    width: dict[str, Any] = dict(d_model=1024, d_kv=64, d_ff=4096, num_heads=16)
    if row.quick:
        width = dict(d_model=64, d_kv=16, d_ff=96, num_heads=4)
    model: Any = T5EncoderModel(T5Config(**width, num_layers=2, vocab_size=VOCABULARY, dropout_rate=0.0))
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    nn.init.normal_(bias)  # the default is so small that a wrong bias would not show in the outputs
    encoder: nn.Module = model
    return encoder


_ROWS = [
    Row("llama8b-sdpa-4096", "Llama-8B, S=4096", _llama, 4096, patchable=True, cold=True),
    Row("llama8b-sdpa-16384", "Llama-8B, S=16384", _llama, 16384, patchable=True, target=1.7),
    Row("llama8b-sdpa-32768", "Llama-8B, S=32768", _llama, 32768, patchable=True, target=2.1),
    Row("t5-large-encoder-8192", "T5-large encoder, S=8192", _t5, 8192, target=3.0),
    Row("bloom7b-8192", "BLOOM-7B, S=8192", _bloom, 8192, target=2.2),
    Row(
        "llama8b-sdpa-16384-training",
        "Llama-8B, S=16384, training",
        _llama,
        16384,
        training=True,
        patchable=True,
        target=1.6,
    ),
    Row("llama8b-sdpa-16384-ones", "Llama-8B, S=16384, mask of ones", _llama, 16384, mask_of_ones=True, patchable=True),
    Row("llama8b-eager-8192", "Llama-8B, eager attention, S=8192", _llama_eager, 8192),
    Row(
        "llama8b-sdpa-4096-training",
        "Llama-8B, S=4096, training",
        _llama,
        4096,
        training=True,
        patchable=True,
        cold=True,
    ),
    Row("llama8b-sdpa-32768-training", "Llama-8B, S=32768, training", _llama, 32768, training=True, patchable=True),
]
