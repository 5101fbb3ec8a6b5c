"""torch.nn itself and packages of single models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.registry import Built, case, image, padding, tokens


class _Itself(nn.Module):
    """A module of query, key and value, called with one tensor as all three."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **given: Any) -> Any:
        return self.inner(x, x, x, **given)


@case("torch_attention_weights", "torch", "probabilities returned")
def _weights() -> Built:
    return _Itself(nn.MultiheadAttention(64, 4, batch_first=True)), (torch.randn(2, 32, 64),), {"key_padding_mask": padding() == 0}


@case("torch_attention", "torch", "key padding")
def _attention() -> Built:
    given = {"key_padding_mask": padding() == 0, "need_weights": False}
    return _Itself(nn.MultiheadAttention(64, 4, batch_first=True)), (torch.randn(2, 32, 64),), given


@case("torch_encoder", "torch", "causal")
def _encoder() -> Built:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(32)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, 32, 64),), {"mask": mask, "is_causal": True}


@case("torch_decoder", "torch", "causal, cross")
def _decoder() -> Built:
    mask = nn.Transformer.generate_square_subsequent_mask(24)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), 2)
    return model, (torch.randn(2, 24, 64), torch.randn(2, 32, 64)), {"tgt_mask": mask, "tgt_is_causal": True}


def _litgpt(**given: Any) -> Built:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=64, vocab_size=99, padded_vocab_size=99, n_layer=2, n_head=4, n_embd=64, n_query_groups=2, head_size=16,
        rotary_percentage=1.0, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=128, bias=False,
        parallel_residual=False, **given,
    )  # fmt: skip
    model = GPT(config)
    model.max_seq_length = 32
    return model, (tokens(),), {}


case("litgpt_llama", "litgpt", "grouped heads")(_litgpt)
case("litgpt_gemma2", "litgpt", "softcap, window")(
    lambda: _litgpt(attention_logit_softcapping=5.0, sliding_window_size=8, sliding_window_indices=[1, 0])
)


@case("esm2", "esm", "key padding, rotary")
def _esm() -> Built:
    from esm.model.esm2 import ESM2

    return ESM2(num_layers=2, embed_dim=64, attention_heads=4), (torch.randint(4, 24, (2, 24)),), {}


@case("monai_unetr", "monai", "einsum")
def _unetr() -> Built:
    from monai.networks.nets import UNETR

    model = UNETR(
        in_channels=1, out_channels=2, img_size=(32, 32), feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4, spatial_dims=2
    )
    return model, (torch.randn(1, 1, 32, 32),), {}


@case("open_clip_text", "open_clip", "causal")
def _open_clip() -> Built:
    from open_clip.transformer import TextTransformer

    return TextTransformer(context_length=16, vocab_size=99, width=64, heads=4, layers=2, output_dim=32), (tokens(2, 16),), {}


@case("loftr", "kornia", "einsum")
def _loftr() -> Built:
    from kornia.feature.loftr.loftr_module.transformer import LocalFeatureTransformer

    settings = {"d_model": 64, "nhead": 4, "layer_names": ["self", "cross"], "attention": "full"}
    return LocalFeatureTransformer(settings), (torch.randn(2, 32, 64), torch.randn(2, 24, 64)), {}


@case("denoising_unet", "denoising_diffusion_pytorch", "full, linear")
def _unet() -> Built:
    from denoising_diffusion_pytorch import Unet

    model = Unet(dim=16, dim_mults=(1, 2), full_attn=(False, True), attn_heads=2, attn_dim_head=16)
    return model, (image(), torch.tensor([3, 50])), {}
