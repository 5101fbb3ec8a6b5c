"""Models of sound."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.coverage.hugging_face import models
from benchmarks.coverage.registry import Built, case, padding, tokens

WAVE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 32,
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600)}


models("wav2vec2", "full", "Wav2Vec2Config", "Wav2Vec2Model", wave, WAVE)
models("hubert", "full", "HubertConfig", "HubertModel", wave, WAVE)
models("wavlm", "gated bucketed bias", "WavLMConfig", "WavLMModel", wave, WAVE, only="eager")
models(
    "wav2vec2_bert", "keys of distances", "Wav2Vec2BertConfig", "Wav2Vec2BertModel",
    lambda: {"input_features": torch.randn(2, 32, 16), "attention_mask": padding()},
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
     "feature_projection_input_dim": 16, "position_embeddings_type": "relative_key", "conv_depthwise_kernel_size": 7}, only="eager",
)  # fmt: skip


def _whisper(fused: bool) -> Built:
    from whisper.model import ModelDimensions, MultiHeadAttention, Whisper

    MultiHeadAttention.use_sdpa = fused
    return Whisper(ModelDimensions(16, 32, 64, 4, 2, 99, 32, 64, 4, 2)), (torch.randn(2, 16, 64), tokens(2, 24)), {}


case("whisper_sdpa", "whisper", "causal, cross")(lambda: _whisper(True))
case("whisper_eager", "whisper", "causal, cross")(lambda: _whisper(False))
