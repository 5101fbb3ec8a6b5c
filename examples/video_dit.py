"""A video diffusion transformer as its authors write one, denoised with full attention, radially, and in 3-D neighbourhoods.

The model below knows nothing of attnfx: patches of space and time, rotary positions of three axes, normalised queries and keys,
cross attention to the text, shifts and gates from the time step, as Latte, CogVideoX and Wan have them. A policy names the layout
of its tokens; the first layer stays dense, as is usual, and cross attention is not named. The weights are random: shown is how
much of the attention is computed, how far each layer's result moves on its own inputs, and how far the video does.

python examples/video_dit.py
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfx
from attnfx.variants import NeighborhoodAttention, Radial


def rotary(frames: int, rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, width) of positions in time, height and width, each of which has a part of the head."""
    parts = []
    for axis, part in zip(torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij"), (2, 3, 3), strict=True):
        pairs = part * width // 16
        parts.append(axis.flatten()[:, None] * 10000.0 ** (-torch.arange(pairs) / pairs))
    angle = torch.cat(parts, -1).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    odd, even = -x[..., 1::2], x[..., ::2]
    return x * cos + torch.stack([odd, even], -1).flatten(-2) * sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, context: Tensor | None = None, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads)
        self.norm1, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, text: Tensor, time_embedding: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        modulation = self.scale_shift_table + time_embedding.unflatten(-1, (6, -1))
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation[:, :, None].unbind(1)
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, rotation=rotation)
        x = x + self.attn2(self.norm2(x), text)
        return x + ff_gate * self.ff(self.norm3(x) * (1 + ff_scale) + ff_shift)


class VideoDiT(nn.Module):
    """Predicts the velocity of a latent video (B, C, T, H, W) at a time (B,), given a text (B, L, width)."""

    def __init__(self, channels: int = 4, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        patch = (1, 2, 2)
        self.patch, self.width, self.head_dim = patch, width, width // heads
        self.patch_embedding = nn.Conv3d(channels, width, patch, stride=patch)
        self.time_proj = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out, self.proj_out = nn.LayerNorm(width), nn.Linear(width, channels * math.prod(patch))

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = self.patch_embedding(latent)
        frames, rows, columns = x.shape[2:]
        rotation = rotary(frames, rows, columns, self.head_dim)
        angle = t[:, None] * 10000.0 ** (-torch.arange(self.width // 2) / (self.width // 2))
        time_embedding = self.time_proj(torch.cat([angle.cos(), angle.sin()], -1))
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text, time_embedding, rotation)
        x = self.proj_out(self.norm_out(x)).unflatten(-1, (*self.patch, -1)).unflatten(1, (frames, rows, columns))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


def denoised(model: nn.Module, noise: Tensor, text: Tensor, steps: int = 2) -> Tensor:
    """Euler's steps from noise to a video."""
    x = noise
    for step in range(steps):
        x = x - model(x, torch.full((len(x),), 1000 * (1 - step / steps)), text) / steps
    return x


torch.manual_seed(0)
model = VideoDiT().eval()
noise, text = torch.randn(1, 4, 16, 24, 24), torch.randn(1, 12, 128)
FRAMES = (16, 12, 12)
VARIANTS = {
    "radial": Radial(FRAMES[0], FRAMES[1] * FRAMES[2], decay_factor=0.1, block_size=48),
    "3-D neighbourhoods, shared by runs of tokens": NeighborhoodAttention(FRAMES, (4, 6, 6), stride=(2, 3, 3)),
}

with torch.no_grad():
    whole = denoised(model, noise, text)
    for name, variant in VARIANTS.items():
        policy = [attnfx.Rule("blocks.0.*", "keep"), attnfx.Rule("blocks.*.attn1", variant)]
        found = attnfx.verify(model, noise, torch.tensor([600.0]), text, policy=policy)
        print(f"{name}\n{found}")
        sites = found.report.sites
        assert sum(type(s.variant) is type(variant) for s in sites) == 2
        assert sum(s.exact for s in sites) == 4
        run = attnfx.compile(model, policy=policy, inner="eager")
        video = denoised(run, noise, text)
        moved = float((video - whole).norm() / whole.norm())
        print(f"the denoised video moves by {moved:.2g} of its size\n")
        assert 0 < moved < 0.5
