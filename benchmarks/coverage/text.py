"""Language models of transformers: encoders, decoders, encoder-decoders."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.hugging_face import models
from benchmarks.coverage.registry import padding, tokens

WIDTHS = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENCODER = {**WIDTHS, "max_position_embeddings": 128}
DECODER = {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GPT = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
PAIR = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def encoder() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": padding()}


def decoder() -> dict[str, Any]:
    return {**encoder(), "use_cache": False}


def pair() -> dict[str, Any]:
    return {**decoder(), "decoder_input_ids": tokens(2, 24)}


models("albert", "key padding", "AlbertConfig", "AlbertModel", encoder, {**ENCODER, "embedding_size": 32})
models("bert", "key padding", "BertConfig", "BertModel", encoder, ENCODER)
models("roberta", "key padding", "RobertaConfig", "RobertaModel", encoder, {**ENCODER, "pad_token_id": 0})
models("electra", "key padding", "ElectraConfig", "ElectraModel", encoder, {**ENCODER, "embedding_size": 32})
models("roformer", "rotary", "RoFormerConfig", "RoFormerModel", encoder, {**ENCODER, "embedding_size": 64}, only="eager")
models("modernbert", "local and global", "ModernBertConfig", "ModernBertModel", encoder, {**DECODER, "local_attention": 8})
models(
    "deberta_v2", "disentangled", "DebertaV2Config", "DebertaV2Model", encoder,
    {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}, only="eager",
)  # fmt: skip
models("mpnet", "bucketed bias", "MPNetConfig", "MPNetModel", encoder, ENCODER, only="eager")
models("gpt2", "causal", "GPT2Config", "GPT2Model", decoder, GPT)
models("gpt_neo", "causal, local", "GPTNeoConfig", "GPTNeoModel", decoder, {
    "vocab_size": 99, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
    "window_size": 8, "bos_token_id": 1, "eos_token_id": 2,
}, only="eager")  # fmt: skip
models("gpt_neox", "causal", "GPTNeoXConfig", "GPTNeoXModel", decoder, DECODER)
models("gptj", "causal", "GPTJConfig", "GPTJModel", decoder, {**GPT, "rotary_dim": 8}, only="eager")
models(
    "bloom",
    "ALiBi",
    "BloomConfig",
    "BloomModel",
    decoder,
    {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    only="eager",
)
models(
    "mpt", "ALiBi", "MptConfig", "MptModel", decoder, {"vocab_size": 99, "d_model": 64, "n_layers": 2, "n_heads": 4}, only="eager"
)
models("opt", "causal", "OPTConfig", "OPTModel", decoder, {**DECODER, "ffn_dim": 128, "word_embed_proj_dim": 64})
models("gpt_bigcode", "one key head", "GPTBigCodeConfig", "GPTBigCodeModel", decoder, {**GPT, "n_positions": 128})
models("llama", "grouped heads", "LlamaConfig", "LlamaForCausalLM", decoder, GROUPED)
models("mistral", "window", "MistralConfig", "MistralModel", decoder, {**GROUPED, "sliding_window": 8})
models("qwen2", "grouped heads", "Qwen2Config", "Qwen2Model", decoder, GROUPED)
models("qwen3", "grouped heads", "Qwen3Config", "Qwen3Model", decoder, {**GROUPED, "head_dim": 16})
models(
    "gemma2",
    "softcap, window",
    "Gemma2Config",
    "Gemma2Model",
    decoder,
    {**GROUPED, "head_dim": 16, "sliding_window": 8},
    only="eager",
)
models("gemma3", "window", "Gemma3TextConfig", "Gemma3TextModel", decoder, {**GROUPED, "head_dim": 16, "sliding_window": 8})
models("phi3", "grouped heads", "Phi3Config", "Phi3Model", decoder, GROUPED)
models(
    "falcon", "one key head", "FalconConfig", "FalconModel", decoder, {k: v for k, v in DECODER.items() if k != "intermediate_size"}
)
models("cohere", "grouped heads", "CohereConfig", "CohereModel", decoder, GROUPED)
models("olmo2", "grouped heads", "Olmo2Config", "Olmo2Model", decoder, GROUPED)
models("t5", "bucketed bias", "T5Config", "T5Model", pair, T5)
models("umt5", "bucketed bias", "UMT5Config", "UMT5Model", pair, T5)
models("bart", "cross", "BartConfig", "BartModel", pair, PAIR)
models("pegasus", "cross", "PegasusConfig", "PegasusModel", pair, PAIR)
models("m2m_100", "cross", "M2M100Config", "M2M100Model", pair, PAIR)
