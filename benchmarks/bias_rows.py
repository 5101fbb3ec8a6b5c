"""The rows of `benchmarks.biases`: attention with a bias or mask as models spell it, and the same written by hand for each peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs on a device, and the attention of them in three hands.

    `eager` is the model's spelling: attnfx and torch.compile's default get it. `flex` and `sdpa` take the same inputs and
    are what one writes by hand; None: nobody would. `truth` computes it in float32; None: `eager` does, with float32
    inputs. `learned`: places of inputs, beside the first three, whose gradient is asked for.
    """

    inputs: tuple[Tensor, ...]
    eager: Attend
    flex: Callable[[], Attend] | None
    sdpa: Attend | None
    truth: Attend | None = None
    learned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One case; `targets`: how many times as fast as a peer attnfx is to be, forward alone or with backward."""

    name: str
    make: Callable[[str, bool], Case]
    backward: bool = False
    targets: dict[str, float] = field(default_factory=dict)


def _noise(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(sum(shape)))


def _qkv(device: str, batch: int, heads: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator(device).manual_seed(0)
    # as a projection leaves them: heads beside each other
    q, k, v = (torch.randn(batch, length, heads, width, device=device, dtype=torch.bfloat16, generator=noise) for _ in range(3))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sizes(quick: bool) -> tuple[int, int, int, int]:
    return (1, 2, 256, 64) if quick else (2, 16, 8192, 128)


def _flex(score: Callable[..., Tensor] | None = None, mask: Callable[..., Tensor] | None = None, length: int = 0) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    call = torch.compile(flex_attention, dynamic=False)
    blocks = torch.compile(create_block_mask)(mask, None, None, length, length, device="cuda") if mask else None
    return lambda q, k, v, *_: call(q, k, v, score_mod=score, block_mask=blocks)  # type: ignore[return-value]


def alibi(kind: str, device: str, quick: bool) -> Case:
    """ALiBi, one slope a head: slope * (j - i), alone ("full") or under a causal mask ("causal"), added in float32 as the slopes
    are; and -slope * |i - j| as encoders have it, rounded to the model's bfloat16 ("symmetric")."""
    batch, heads, length, width = _sizes(quick)
    q, k, v = _qkv(device, batch, heads, length, width)
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device, dtype=torch.float32))

    def bias(slopes: Tensor) -> Tensor:
        at = torch.arange(length, device=device)
        away = at[None, :] - at[:, None]
        return (-slopes[:, None, None] * away.abs()).to(q.dtype) if kind == "symmetric" else slopes[:, None, None] * away

    def eager(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * width**-0.5 + bias(slopes)
        if kind == "causal":
            at = torch.arange(length, device=device)
            scores = scores.masked_fill(at[None, :] > at[:, None], float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s - slopes[h] * (i - j).abs() if kind == "symmetric" else s + slopes[h] * (j - i)

    dense = bias(slopes)[None]
    if kind == "causal":
        dense = dense.masked_fill(torch.ones(length, length, dtype=torch.bool, device=device).triu(1), float("-inf"))
    # the same softmax, and bfloat16 is fine where there is weight
    dense = (dense - dense.amax(-1, keepdim=True)).to(torch.bfloat16)
    flex = partial(_flex, score, (lambda b, h, i, j: i >= j) if kind == "causal" else None, length)
    return Case((q, k, v, slopes), eager, flex, sdpa)


def distances(causal: bool, device: str, quick: bool) -> Case:
    """The queries times an embedding of each distance, skewed by padding and a view: Music Transformer, and Conformer's 2 N - 1
    distances without a mask."""
    batch, heads, length, width = _sizes(quick)
    q, k, v = _qkv(device, batch, heads, length, width)
    embedding = _noise(device, length if causal else 2 * length - 1, width)

    def about(q: Tensor, embedding: Tensor) -> Tensor:
        at = torch.arange(length, device=q.device)
        products = functional.pad(q @ embedding.transpose(0, 1), (1, 0))
        shifted = products.view(*q.shape[:2], products.shape[-1], length)[:, :, 1:]
        shifted = shifted if causal else shifted.reshape(*q.shape[:2], length, 2 * length - 1)[..., :length]
        return shifted.masked_fill(at[None, :] > at[:, None], float("-inf")) if causal else shifted

    def eager(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) + about(q, embedding)) * width**-0.5
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=about(q, embedding) * width**-0.5)

    return Case((q, k, v, embedding), eager, None, sdpa, learned=(3,))


def relative_table(device: str, quick: bool) -> Case:
    """One learned number for each head and distance: table[h, i - j]."""
    batch, heads, length, width = _sizes(quick)
    q, k, v = _qkv(device, batch, heads, length, width)
    table = _noise(device, heads, 2 * length, dtype=torch.float32)

    def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        scores = q @ k.transpose(-1, -2) * width**-0.5
        scores = scores + table[:, at[:, None] - at[None, :] + q.shape[2]]
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        bias = table[:, at[:, None] - at[None, :] + q.shape[2]]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])

    def flex() -> Attend:
        from torch.nn.attention.flex_attention import flex_attention

        call = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            return call(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, i - j + length])  # type: ignore[return-value]

        return attend

    return Case((q, k, v, table), eager, flex, sdpa, learned=(3,))


def triangle(device: str, quick: bool) -> Case:
    """AlphaFold's triangle attention: rows of the pair representation, a pair bias [1, h, N, N] and a key mask [N, 1, 1, N]."""
    length, heads, width = (32, 2, 16) if quick else (512, 4, 32)
    q, k, v = _qkv(device, length, heads, length, width)
    pair = _noise(device, 1, heads, length, length)
    mask = torch.ones(length, length, device=device, dtype=torch.bfloat16)
    mask[:, -length // 8 :] = 0

    def eager(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(q * width**-0.5, k.transpose(-1, -2))
        scores = scores + (1e9 * (mask - 1))[:, None, None, :] + pair
        return torch.matmul(scores.softmax(-1), v)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=pair + (1e9 * (mask - 1))[:, None, None, :])

    def flex() -> Attend:
        from torch.nn.attention.flex_attention import flex_attention

        call = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, mask: Tensor) -> Tensor:
            return call(q, k, v, score_mod=lambda s, b, h, i, j: s + pair[0, h, i, j] + 1e9 * (mask[b, j] - 1))  # type: ignore[return-value]

        return attend

    return Case((q, k, v, pair, mask), eager, flex, sdpa, learned=(3,))


def swin(device: str, quick: bool) -> Case:
    """Swin: windows of 7 x 7 tokens, a table of 169 numbers a head read through an index of 49 x 49."""
    windows, heads, side, width = (8, 2, 7, 32) if quick else (1024, 6, 7, 32)
    q, k, v = _qkv(device, windows, heads, side * side, width)
    table = _noise(device, (2 * side - 1) ** 2, heads)
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    away = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + side - 1
    places = (away[..., 0] * (2 * side - 1) + away[..., 1]).to(device)

    def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor) -> Tensor:
        n = q.shape[2]
        scores = (q * width**-0.5) @ k.transpose(-2, -1)
        bias = table[places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        return (scores + bias.unsqueeze(0)).softmax(-1) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor) -> Tensor:
        n = q.shape[2]
        bias = table[places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])

    return Case((q, k, v, table, places), eager, None, sdpa, learned=(3,))


def squared_distance(device: str, quick: bool) -> Case:
    """A bias of -c * |x_i - x_j|^2 for points in space, one c a head."""
    heads, length, width = (2, 300, 32) if quick else (8, 16_384, 32)
    q, k, v = _qkv(device, 1, heads, length, width)
    points = _noise(device, 1, length, 3, dtype=torch.float32)
    falloff = torch.linspace(0.1, 1.0, heads, device=device)

    def bias(points: Tensor, falloff: Tensor) -> Tensor:
        away = ((points[:, :, None, :] - points[:, None, :, :]) ** 2).sum(-1)
        return -falloff[None, :, None, None] * away[:, None]

    def eager(q: Tensor, k: Tensor, v: Tensor, points: Tensor, falloff: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * width**-0.5
        return (scores + bias(points, falloff)).softmax(-1).to(q.dtype) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor, points: Tensor, falloff: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias(points, falloff).to(q.dtype))

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x, y, z = (points[b, i, n] - points[b, j, n] for n in range(3))
        return s - falloff[h] * (x * x + y * y + z * z)

    return Case((q, k, v, points, falloff), eager, partial(_flex, score), sdpa)


def documents(length: int, device: str, quick: bool) -> Case:
    """Causal attention inside of documents packed one after another, their ids counted from end-of-text tokens."""
    length = 512 if quick else length
    heads, width = (2, 64) if quick else (16, 128)
    q, k, v = _qkv(device, 1, heads, length, width)
    ends = torch.zeros(1, length, dtype=torch.int64, device=device)
    ends[0, torch.tensor([0.03, 0.08, 0.16, 0.3, 0.42, 0.6, 0.85]).mul(length).long().to(device)] = 1

    def eager(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        ids = ends.cumsum(-1)
        at = torch.arange(q.shape[2], device=q.device)
        keep = (ids[:, None, :, None] == ids[:, None, None, :]) & (at[:, None] >= at[None, :])
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    def truth(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        cuts = [0, *ends[0].nonzero()[:, 0].tolist(), length]
        pieces = [
            functional.scaled_dot_product_attention(*(t[:, :, a:b] for t in (q, k, v)), is_causal=True)
            for a, b in pairwise(cuts)
            if b > a
        ]
        return torch.cat(pieces, 2)

    ids = ends.cumsum(-1)[0]
    flex = partial(_flex, None, lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]), length)
    return Case((q, k, v, ends), eager, flex, eager if length <= 16_384 else None, truth)


ROWS = (
    Row("alibi-full", partial(alibi, "full"), targets={"flex": 1.2, "sdpa": 1.8}),
    Row("alibi-full-backward", partial(alibi, "full"), backward=True, targets={"flex": 1.2}),
    Row("alibi-causal", partial(alibi, "causal")),
    Row("alibi-causal-backward", partial(alibi, "causal"), backward=True),
    Row("alibi-symmetric", partial(alibi, "symmetric")),
    Row("table", relative_table, targets={"flex": 2.2}),
    Row("table-backward", relative_table, backward=True, targets={"flex": 1.2}),
    Row("distances-causal", partial(distances, True)),
    Row("distances-causal-backward", partial(distances, True), backward=True),
    Row("distances-full", partial(distances, False)),
    Row("distances-full-backward", partial(distances, False), backward=True),
    Row("triangle", triangle, targets={"flex": 1.4, "sdpa": 2.5, "compiled": 8.0}),
    Row("triangle-backward", triangle, backward=True),
    Row("swin", swin, targets={"compiled": 1.2}),
    Row("swin-backward", swin, backward=True),
    Row("squared-distance", squared_distance, targets={"sdpa": 2.0}),
    Row("documents-16k", partial(documents, 16_384)),
    Row("documents-64k", partial(documents, 65_536)),
)
