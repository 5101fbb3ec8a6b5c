"""Models of images: transformers and timm."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.coverage.hugging_face import models
from benchmarks.coverage.registry import Built, case, image

VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def pixels() -> dict[str, Any]:
    return {"pixel_values": image()}


def large() -> dict[str, Any]:
    return {"pixel_values": image(64)}


models("vit", "full", "ViTConfig", "ViTModel", pixels, VIT)
models("deit", "full", "DeiTConfig", "DeiTModel", pixels, VIT)
models("dinov2", "full", "Dinov2Config", "Dinov2Model", pixels, VIT)
models("clip_vision", "full", "CLIPVisionConfig", "CLIPVisionModel", pixels, VIT)
models("siglip_vision", "full", "SiglipVisionConfig", "SiglipVisionModel", pixels, VIT)
models("beit", "table bias", "BeitConfig", "BeitModel", pixels, {**VIT, "use_relative_position_bias": True})
models(
    "swin", "shifted window", "SwinConfig", "SwinModel", pixels,
    {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, only="eager",
)  # fmt: skip
models(
    "swinv2", "shifted window, cosine", "Swinv2Config", "Swinv2Model", pixels,
    {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, only="eager",
)  # fmt: skip
models(
    "segformer", "reduced keys", "SegformerConfig", "SegformerModel", large,
    {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}, only="eager",
)  # fmt: skip
models(
    "cvt",
    "einsum",
    "CvtConfig",
    "CvtModel",
    large,
    {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    only="eager",
)
models(
    "sam", "bias from queries", "SamVisionConfig", "SamVisionModel", large,
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "window_size": 4,
     "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 128},
)  # fmt: skip


def timm(name: str, spelling: str, module: str, model: str, size: int = 32, written_out: bool = True, **given: Any) -> None:
    """Register a model of timm with its fused attention, and (``written_out``) with its own."""
    for fused in (True, False) if written_out else (True,):

        def make(fused: bool = fused) -> Built:
            layers = importlib.import_module("timm.layers")
            layers.set_fused_attn(fused)
            try:
                return getattr(importlib.import_module(f"timm.models.{module}"), model)(num_classes=10, **given), (image(size),), {}
            finally:
                layers.set_fused_attn(True)

        case(f"timm_{name}_{'sdpa' if fused else 'eager'}", "timm", spelling)(make)


PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
timm("vit", "full", "vision_transformer", "VisionTransformer", **PLAIN)
timm("vit_pooled", "one learned query", "vision_transformer", "VisionTransformer", **PLAIN, global_pool="map", class_token=False)
timm("beit", "table bias", "beit", "Beit", **PLAIN, use_rel_pos_bias=True)
timm("cait", "talking heads", "cait", "Cait", **PLAIN, depth_token_only=1)
timm("convit", "gated positions", "convit", "ConVit", **PLAIN, local_up_to_layer=1)
timm(
    "swin",
    "shifted window",
    "swin_transformer",
    "SwinTransformer",
    img_size=32,
    patch_size=2,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
)
timm("xcit", "channels", "xcit", "Xcit", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
timm("levit", "table bias", "levit", "Levit", 64, img_size=64, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(2, 3))
