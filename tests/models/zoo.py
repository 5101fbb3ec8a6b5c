"""Real models at toy size: unmodified classes, small seeded random weights, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

Inputs = dict[str, object]
VOCABULARY, LENGTH, BATCH = 59, 45, 2  # odd on purpose: no axis is a multiple of a vector or a tile
MASKS = ("none", "ones", "right", "left")


@dataclass(frozen=True)
class ModelCase:
    """One model of the zoo. `build` gives the model in evaluation mode and the keyword arguments of one forward.

    `sites` is the number of attentions in one forward, `mask` the argument that takes a padding mask (None: there is
    none) and `mask_of` the input it masks, `lengths` whether the sequence length may vary.
    `layer_by_layer`: in training the model branches on a random number (layerdrop), so that Dynamo, with any backend,
    compiles each layer alone, equal layers once, and knows only the path below the layer.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int, int], Inputs]
    sites: int
    trains: bool = True
    mask: str | None = "attention_mask"
    mask_of: str = "input_ids"
    lengths: bool = True
    layer_by_layer: bool = False

    @property
    def supports_mask(self) -> bool:
        return self.mask is not None

    def build(
        self, length: int = LENGTH, mask: str = "none", dtype: torch.dtype = torch.float32, batch: int = BATCH
    ) -> tuple[nn.Module, Inputs]:
        """The model (weights the same at every call) and its inputs, both in `dtype`."""
        torch.manual_seed(0)
        model = _lively(self.make()).to(dtype).eval()
        return model, self.arguments(length, mask, dtype, batch)

    def arguments(
        self,
        length: int = LENGTH,
        mask: str = "none",
        dtype: torch.dtype = torch.float32,
        batch: int = BATCH,
        seed: int = 1,
    ) -> Inputs:
        """Keyword arguments of one forward; token ids are the same in every dtype."""
        given = self.inputs(torch.Generator().manual_seed(seed), batch, length)
        if mask != "none":
            if self.mask is None:
                raise ValueError(f"{self.name} takes no padding mask, asked for mask={mask!r}")
            kept = padding(batch, _length(given[self.mask_of]), mask)
            given[self.mask] = kept == 0 if self.mask == "src_key_padding_mask" else kept
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def padding(batch: int, length: int, side: str) -> Tensor:
    """int64 [batch, length] of ones and zeros; row 0 is whole, the last row has lost about a third of its tokens."""
    kept = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        lost = row * length // (3 * (batch - 1))
        if side == "right":
            kept[row, length - lost :] = 0
        elif side == "left":
            kept[row, :lost] = 0
    return kept


def _length(value: object) -> int:
    assert isinstance(value, Tensor)
    return value.shape[1]


def _lively(model: nn.Module) -> nn.Module:
    """Give weights a size at which attention is neither uniform nor one-hot: fresh models start too flat to tell."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=noise)
            if parameter.dim() < 2:
                parameter.add_(0.1 * spread)
            elif "relative_attention_bias" in name:
                parameter.copy_(spread)
            elif "embed" not in name and "wte" not in name and "wpe" not in name and "shared" not in name:
                parameter.copy_(spread * 1.3 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * spread)
    return model


def _tokens(generator: torch.Generator, batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator), "use_cache": False}


def _plain_tokens(generator: torch.Generator, batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def _pair_of_tokens(generator: torch.Generator, batch: int, length: int) -> Inputs:
    target = torch.randint(3, VOCABULARY, (batch, length - 8), generator=generator)
    return {**_tokens(generator, batch, length), "decoder_input_ids": target}


def _pixels(generator: torch.Generator, batch: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 30, 42, generator=generator)}


def _sound(generator: torch.Generator, batch: int, length: int) -> Inputs:
    return {
        "input_features": torch.randn(batch, 10, 2 * 53, generator=generator),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator),
        "use_cache": False,
    }


def _vectors(generator: torch.Generator, batch: int, length: int) -> Inputs:
    return {"src": torch.randn(batch, length, 24, generator=generator)}


def _llama(attention: str, layers: int = 2) -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def _mistral() -> nn.Module:
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        sliding_window=13,
        pad_token_id=0,
    )
    return MistralForCausalLM._from_config(config, attn_implementation="sdpa")


def _gpt2(attention: str) -> nn.Module:
    config = GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=3,
        vocab_size=VOCABULARY,
        n_positions=8192,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def _bloom() -> nn.Module:
    config = BloomConfig(hidden_size=30, n_layer=2, n_head=3, vocab_size=VOCABULARY, hidden_dropout=0.0, attention_dropout=0.0)
    return BloomForCausalLM(config)


def _opt() -> nn.Module:
    config = OPTConfig(
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=VOCABULARY,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        word_embed_proj_dim=24,
        max_position_embeddings=8192,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def _bert() -> nn.Module:
    config = BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=8192,
    )
    return BertModel(config, add_pooling_layer=False)


def _t5_config() -> T5Config:
    return T5Config(
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        vocab_size=VOCABULARY,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
        dropout_rate=0.0,
    )


def _t5_encoder() -> nn.Module:
    return T5EncoderModel._from_config(_t5_config(), attn_implementation="eager")


def _vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=(30, 42),
        patch_size=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


def _whisper() -> nn.Module:
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=10,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        d_model=24,
        max_source_positions=53,
        max_target_positions=448,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ZOO: dict[str, ModelCase] = {
    case.name: case
    for case in (
        ModelCase("llama-sdpa", lambda: _llama("sdpa"), _tokens, sites=2),
        ModelCase("llama-eager", lambda: _llama("eager"), _tokens, sites=2),
        ModelCase("mistral-window", _mistral, _tokens, sites=2),
        ModelCase("gpt2-sdpa", lambda: _gpt2("sdpa"), _tokens, sites=2),
        ModelCase("gpt2-eager", lambda: _gpt2("eager"), _tokens, sites=2),
        ModelCase("bloom", _bloom, _tokens, sites=2),
        ModelCase("opt", _opt, _tokens, sites=2, layer_by_layer=True),
        ModelCase("bert", _bert, _plain_tokens, sites=2),
        ModelCase("t5", lambda: T5ForConditionalGeneration(_t5_config()), _pair_of_tokens, sites=6),
        ModelCase("t5-encoder-eager", _t5_encoder, _plain_tokens, sites=2),
        ModelCase("vit", _vit, _pixels, sites=2, mask=None, lengths=False),
        ModelCase(
            "whisper", _whisper, _sound, sites=6, mask="decoder_attention_mask", mask_of="decoder_input_ids", layer_by_layer=True
        ),
        ModelCase("torch-encoder", _encoder, _vectors, sites=2, mask="src_key_padding_mask", mask_of="src"),
    )
}
NEVER_SQUARE = (
    "llama-sdpa",
    "llama-eager",
    "mistral-window",
    "gpt2-sdpa",
    "gpt2-eager",
    "bloom",
    "t5",
    "t5-encoder-eager",
)
