"""Models from libraries of building blocks: vit-pytorch, x-transformers, local-attention, diffusers."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.coverage.registry import Built, case, image, padding, tokens

VIT = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128, "dim_head": 16}


def vit(name: str, spelling: str, module: str, model: str = "ViT", **given: Any) -> None:
    def make() -> Built:
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), model)(**(given or VIT)), (image(),), {}

    case(f"vit_pytorch_{name}", "vit_pytorch", spelling)(make)


vit("vit", "einops", "vit")
vit("simple", "einops", "simple_vit", "SimpleViT")
vit("deep", "talking heads", "deepvit", "DeepViT")
vit("rvt", "rotary", "rvt", "RvT")
vit("xcit", "channels", "xcit", "XCiT", **VIT, cls_depth=1)
vit("max_vit", "window, grid", "max_vit", "MaxViT", num_classes=10, dim=32, depth=(1,), dim_head=16, window_size=4)


def stack(name: str, spelling: str, encoder: bool = False, **given: Any) -> None:
    def make() -> Built:
        import x_transformers as x

        layers = (x.Encoder if encoder else x.Decoder)(dim=64, depth=2, heads=4, attn_dim_head=16, **given)
        return x.TransformerWrapper(num_tokens=99, max_seq_len=64, attn_layers=layers), (tokens(),), {"mask": padding().bool()}

    case(f"x_transformers_{name}", "x_transformers", spelling)(make)


stack("decoder", "causal")
stack("encoder", "key padding", encoder=True)
stack("flash", "causal", attn_flash=True, rotary_pos_emb=True)
stack("alibi", "ALiBi", alibi_pos_bias=True, alibi_num_heads=2)
stack("t5_bias", "bucketed bias", rel_pos_bias=True)
stack("dynamic_bias", "bias network", encoder=True, dynamic_pos_bias=True)
stack("one_key_head", "one key head", attn_one_kv_head=True)
stack("talking_heads", "talking heads", attn_pre_talking_heads=True)
stack("memory", "memory keys", attn_num_mem_kv=4)
stack("softcap", "softcap", attn_softclamp_logits=True)


@case("local_attention", "local_attention", "chunked window")
def _local() -> Built:
    from local_attention import LocalTransformer

    model = LocalTransformer(num_tokens=99, max_seq_len=64, dim=64, depth=2, local_attn_window_size=8, heads=4, dim_head=16)
    return model, (tokens(2, 64),), {}


def _autoencoder(written_out: bool) -> Built:
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip
    if written_out:
        from diffusers.models.attention_processor import AttnProcessor

        model.set_attn_processor(AttnProcessor())
    return model, (torch.randn(1, 3, 32, 32),), {"return_dict": False}


case("diffusers_autoencoder_sdpa", "diffusers", "full")(lambda: _autoencoder(False))
case("diffusers_autoencoder_eager", "diffusers", "full")(lambda: _autoencoder(True))
