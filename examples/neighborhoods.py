"""Neighbourhoods of an image and of a video, on models of transformers: a ViT in 2-D windows, a VideoMAE in 3-D ones and radially.

The models have random weights: what is shown is how a policy names the layout of the tokens, what the report says of it, and how
far the output of such a model moves.

python examples/neighborhoods.py
"""

import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel, ViTConfig, ViTModel

import attnfx
from attnfx.variants import NeighborhoodAttention, Radial

torch.manual_seed(0)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
image = ViTModel(ViTConfig(**SIZES, image_size=192, patch_size=8), add_pooling_layer=False).eval()
video = VideoMAEModel(VideoMAEConfig(**SIZES, image_size=128, patch_size=8, num_frames=16, tubelet_size=2)).eval()
GRID, FRAMES = (24, 24), (8, 16, 16)

CASES: list[tuple[str, nn.Module, Tensor, attnfx.variants.base.Variant]] = [
    ("ViT, 13 x 13 of 24 x 24 and the class token", image, torch.rand(1, 3, 192, 192),
     NeighborhoodAttention(GRID, 13, extra=1, extra_first=True)),
    ("VideoMAE, 5 x 7 x 7 of 8 x 16 x 16", video, torch.rand(1, 16, 3, 128, 128), NeighborhoodAttention(FRAMES, (5, 7, 7))),
    ("VideoMAE, radial", video, torch.rand(1, 16, 3, 128, 128), Radial(FRAMES[0], FRAMES[1] * FRAMES[2], decay_factor=0.2)),
]  # fmt: skip

with torch.no_grad():
    for name, model, pixels, variant in CASES:
        found = attnfx.verify(model, pixels, policy=[attnfx.Rule("*attention*", variant)])
        print(f"{name}\n{found}\n")
        assert all(type(site.variant) is type(variant) for site in found.report.sites)
