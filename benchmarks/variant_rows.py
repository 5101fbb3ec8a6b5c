"""The rows of `benchmarks.variants`: an attention as a model calls it, the variant put in its place, and who else computes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from attnfx import variants
from attnfx.variants.base import Variant

Keep = Callable[[Tensor, Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of measurements, q (B,H,M,D) over N keys in bfloat16.

    ``keep(i, j)``: what the variant keeps, written down once more, for FlexAttention and the check; None: it hangs on the data.
    ``causal``: of the model's own attention, which "dense" computes. ``pairs``: what the variant keeps of a head. ``targets``: how
    many times as fast as a peer it is to be; ``density``: whether its time is compared with its share of the dense time.
    ``strong``: of so many runs of 64 keys one is three times as long, and the others a tenth: for what goes by scores.
    """

    name: str
    variant: Variant
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    causal: bool = False
    keep: Keep | None = None
    backward: bool = False
    flex: bool = False
    density: bool = False
    linear: str = ""
    strong: int = 0
    targets: dict[str, float] = field(default_factory=dict)

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v laid out as a projection gives them, (B,S,H,D)."""
        noise = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(self.batch, n, self.heads, self.width, device=device, dtype=torch.bfloat16, generator=noise).transpose(1, 2)
            for n in (self.queries, self.keys, self.keys)
        )
        if self.strong:
            strong = torch.arange(self.keys, device=device) // 64 % self.strong == 0
            k = k * torch.where(strong, 3.0, 0.1).to(k.dtype)[:, None]
        return q, k, v

    def model(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of an unmodified model, and the layout that its output projection reads, (B,M,H,D)."""
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal and self.queries > 1)
        return out.transpose(1, 2).contiguous()

    @property
    def dense_pairs(self) -> int:
        """Pairs of query and key that the model's attention keeps, of a head."""
        n, m = self.keys, self.queries
        return sum(range(n - m + 1, n + 1)) if self.causal and m > 1 else m * n


def window(width: int) -> Keep:
    return lambda i, j: (j <= i) & (i - j < width)


def neighbours(layout: tuple[int, ...], size: tuple[int, ...]) -> Keep:
    """NATTEN's rule: each axis has a window of ``size`` that stays inside of it."""

    def keep(i: Tensor, j: Tensor) -> Tensor:
        kept = torch.ones_like(i + j, dtype=torch.bool)
        for length, wide in reversed(list(zip(layout, size, strict=True))):
            x, y = i % length, j % length
            start = (x - wide // 2).clamp(0, length - wide)
            kept = kept & (y >= start) & (y < start + wide)
            i, j = i // length, j // length
        return kept

    return keep


def checkers(block: int) -> tuple[tuple[int, ...], ...]:
    """Blocks on the diagonal, and of the rest one in eight."""
    return tuple(tuple(int(a == b or (5 * a + 3 * b) % 8 == 0) for b in range(block)) for a in range(block))


def blocked(table: tuple[tuple[int, ...], ...], block: int) -> Keep:
    made: dict[torch.device, Tensor] = {}

    def keep(i: Tensor, j: Tensor) -> Tensor:
        if i.device not in made:
            made[i.device] = torch.tensor(table, dtype=torch.bool, device=i.device)
        return made[i.device][i // block, j // block]

    return keep


def radial(frames: int, tokens: int, factor: float, block: int = 128) -> Keep:
    """Radial attention's blocks, from the pairs of each pair of frames; ``tokens`` are whole blocks."""
    made: dict[torch.device, Tensor] = {}

    def table() -> Tensor:
        place = torch.arange(tokens)
        away = (place[:, None] - place).abs()
        seen = torch.eye(frames * tokens // block, dtype=torch.bool).unflatten(0, (frames, -1)).unflatten(2, (frames, -1))
        for a in range(frames):
            for b in range(frames):
                apart = abs(a - b)
                reach = 2.0 ** (tokens.bit_length() - apart.bit_length())
                pairs = torch.ones_like(away, dtype=torch.bool) if apart <= 1 else away <= max(factor * reach, block)
                if reach < block and apart % int(block / reach):
                    pairs = torch.zeros_like(pairs)
                pairs = torch.ones_like(pairs) if b == 0 else pairs  # all see the first frame
                columns = pairs.view(-1, block, tokens).sum(1).unflatten(1, (-1, block))  # pairs of each column of a block
                seen[a, :, b] |= 5 * (3 * columns > block).sum(-1) > 3 * (columns > 0).sum(-1)
        return seen.flatten(2).flatten(0, 1)

    def keep(i: Tensor, j: Tensor) -> Tensor:
        if i.device not in made:
            made[i.device] = table().to(i.device)
        return made[i.device][i // block, j // block]

    return keep


def rows(quick: bool) -> list[Row]:
    """All rows; tiny ones of the same forms if ``quick``."""
    cut = 16 if quick else 1
    heads = 2 if quick else 16
    s, w = 8192 // cut, 1024 // cut
    side, near = (16, 5) if quick else (64, 13)
    video, cube = ((6, 8, 8), (4, 4, 4)) if quick else ((32, 48, 48), (16, 16, 16))
    cells = video[0] * video[1] * video[2]
    table = checkers(s // 128)
    frames, tokens, wide = (8, 64, 16) if quick else (16, 1024, 128)
    square = Row(
        "neighbours-2d", variants.NeighborhoodAttention((side, side), near), 1 if quick else 8, 2 if quick else 12, side**2,
        side**2, 64, keep=neighbours((side, side), (near, near)), flex=True, density=True, targets={"flex": 2.5},
    )  # fmt: skip
    found = [
        Row("window", variants.SlidingWindow(w), 1, heads, s, s, 128, True, window(w), flex=True, density=True),
        square,
        Row(
            "neighbours-3d", variants.NeighborhoodAttention(video, cube), 1, 1 if quick else 8, cells, cells, 64,
            keep=neighbours(video, cube), flex=True, density=True, targets={"flex": 1.5},
        ),
        Row("blocks", variants.BlockSparse(table), 1, heads, s, s, 128, keep=blocked(table, 128), flex=True, density=True),
        Row(
            "radial", variants.Radial(frames, tokens, decay_factor=0.5, block_size=wide), 1, heads, frames * tokens,
            frames * tokens, 128, keep=radial(frames, tokens, 0.5, wide), density=True,
        ),
        Row(
            "top-k-decode", variants.BlockTopK(top=256 // cut, page=16), 1, heads, 1, 65_536 // cut, 128, True,
            targets={"dense": 5.0},
        ),
        Row(
            "vertical-slash", variants.VerticalSlash(segment=0) if not quick else variants.VerticalSlash(40, 128, segment=0), 1,
            heads // 2, 131_072 // cut**2, 131_072 // cut**2, 128, True, targets={"dense": 4.0},
        ),
        Row("skip-softmax", variants.SkipSoftmax(0.03), 1, heads, s, s, 128, True, strong=4, targets={"dense": 1.4}),
        Row("skip-softmax-decode", variants.SkipSoftmax(0.01), 1, heads, 1, 65_536 // cut, 128, True, strong=4),
    ]  # fmt: skip
    return found + [
        Row(
            f"{name}-{length // 1024}k{'-backward' if backward else ''}", made, 1, heads, length // cut, length // cut, 128, True,
            backward=backward, linear=name, targets={"fla": 1.1 if backward else 1.15},
        )
        for name, made in (("linear", variants.LinearAttention("identity", normalize=False)), ("lightning", variants.Lightning()))
        for length in (8192, 65_536, 524_288)
        for backward in (False, True)
    ]  # fmt: skip


def flex(row: Row, device: str) -> Attend:
    """FlexAttention, compiled, with a block mask that was made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert row.keep is not None
    keep = row.keep

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return keep(i, j)

    blocks = torch.compile(create_block_mask)(mask, None, None, row.queries, row.keys, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks).transpose(1, 2)


def fla(row: Row) -> Attend:
    """flash-linear-attention's chunked kernels, on (B,S,H,D)."""
    if row.linear == "linear":
        op, scale = partial(importlib.import_module("fla.ops.linear_attn").chunk_linear_attn, normalize=False), row.width**-0.5
    else:
        made = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn
        op, scale = partial(made, layer_idx=0, num_layers=1), 1.0
    return lambda q, k, v: op(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)[0]
