"""Biases as models spell them: functions of queries, keys, values (B, H, S, D) and what the model has learned or precomputed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Attend = Callable[..., Tensor]
#: Batch, heads, width of a head, and the sides of an image and of a window.
BATCH, HEADS, WIDTH, SIDE, WINDOW = 2, 4, 32, 16, 7
#: What transformers adds where a query does not see a key, in float32.
LOWEST = torch.finfo(torch.float32).min


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The textbook: scores, bias, softmax, values."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * WIDTH**-0.5
    return torch.matmul((scores + bias).softmax(-1), v)


def positions(length: int) -> tuple[Tensor, Tensor]:
    """Those of queries, as a column, and of keys, as a row."""
    return torch.arange(length)[:, None], torch.arange(length)[None, :]


def slopes() -> Tensor:
    """ALiBi's, one for each head."""
    return 2.0 ** (-8.0 / HEADS * torch.arange(1, HEADS + 1, dtype=torch.float32))


def kept(keep: Tensor) -> Tensor:
    """A mask as the numbers that are added."""
    return torch.where(keep, 0.0, -math.inf)


def bloom(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    """transformers' BLOOM: slope times the number of the token among those that are not padding."""
    places = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]
    alibi = (slopes[..., None] * places).reshape(BATCH * HEADS, 1, -1)
    i, j = positions(q.shape[2])
    causal = torch.where(j > i, LOWEST, 0.0).to(q.dtype)
    scores = alibi.baddbmm(q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), beta=1.0, alpha=WIDTH**-0.5)
    weights = functional.softmax(scores.view(BATCH, HEADS, *scores.shape[1:]) + causal, dim=-1)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view_as(q)


def mpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' MPT: slope times minus the distance of a key from the last one."""
    length = q.shape[2]
    alibi = torch.arange(1 - length, 1, dtype=torch.int32).view(1, 1, 1, length)
    base = torch.arange(1, HEADS + 1, dtype=torch.int64).float() * (8 / HEADS)
    alibi = (alibi * (1.0 / torch.pow(2, base)).view(1, HEADS, 1, 1)).squeeze(0)
    scores = torch.matmul(q, k.transpose(-1, -2)) * WIDTH**-0.5 + alibi
    i, j = positions(length)
    return torch.matmul(scores.masked_fill(j > i, LOWEST).softmax(-1), v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi as its paper has it: slope * (j - i) under a causal mask."""
    i, j = positions(q.shape[2])
    return attend(q, k, v, slopes[:, None, None] * (j - i) + kept(j <= i))


def symmetric_alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    return attend(q, k, v, -slopes[:, None, None] * (i - j).abs())


def kerple_log(q: Tensor, k: Tensor, v: Tensor, p: Tensor, a: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    away = (i - j).clamp(min=0).float()
    return attend(q, k, v, -p[:, None, None] * torch.log(1 + a[:, None, None] * away) + kept(j <= i))


def kerple_power(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    away = (i - j).clamp(min=0).float()
    return attend(q, k, v, -a[:, None, None] * away.pow(1.5) + kept(j <= i))


def sandwich(q: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> Tensor:
    """Sandwich: the dot product of sinusoidal embeddings, a sum of cosines of the distance."""
    i, j = positions(q.shape[2])
    away = (i - j).float()
    total = torch.zeros_like(away)
    for n in range(4):
        total = total + torch.cos(away * 10000.0 ** (-n / 4))
    return attend(q, k, v, strength[:, None, None] * total + kept(j <= i))


def sinusoid(q: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    return attend(q, k, v, strength[:, None, None] * torch.cos(0.25 * (i - j)))


def fire(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, c: Tensor) -> Tensor:
    """FIRE with a hidden layer of one unit: a function of log distance over log position."""
    i, j = positions(q.shape[2])
    away = torch.log(c.abs() * (i - j).clamp(min=0) + 1) / torch.log(c.abs() * (i + 1) + 1)
    return attend(q, k, v, w2[:, None, None] * torch.tanh(w1[:, None, None] * away) + kept(j <= i))


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """transformers' T5 encoder: a learned number for each bucket of distances and head."""
    i, j = positions(q.shape[2])
    away, buckets, farthest = j - i, 16, 128
    found = (away > 0).to(torch.long) * buckets
    away = away.abs()
    exact = buckets // 2
    far = exact + (torch.log(away.float() / exact) / math.log(farthest / exact) * (buckets - exact)).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    found = found + torch.where(away < exact, away, far)
    bias = functional.embedding(found, table).permute([2, 0, 1]).unsqueeze(0)
    return torch.matmul((torch.matmul(q, k.transpose(3, 2)) + bias).softmax(-1), v)


def swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """Swin: a table of (2 w - 1)^2 numbers a head, read through an index of w^2 x w^2."""
    n = q.shape[2]
    bias = table[places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
    return attend(q, k, v, bias.unsqueeze(0))


def swin_v2(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor, temperature: Tensor) -> Tensor:
    """Swin V2: cosine scores, and 16 sigmoid of a table that a small network makes."""
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(temperature, max=math.log(1.0 / 0.01)).exp()
    n = q.shape[2]
    bias = table[places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
    return (scores + (16 * torch.sigmoid(bias)).unsqueeze(0)).softmax(-1) @ v


def beit(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """BEiT: Swin's table over a whole image with a class token, handed to torch's attention as its mask."""
    n = q.shape[2]
    bias = functional.embedding(places.view(-1), table).view(n, n, -1).permute(2, 0, 1).contiguous()
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))


def deberta(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    """DeBERTa's content to position term: what the query says of each distance, gathered."""
    i, j = positions(q.shape[2])
    span = embedding.shape[1] // 2
    about = torch.matmul(q, embedding.transpose(-1, -2))
    places = torch.clamp(i - j + span, 0, 2 * span - 1).expand(*about.shape[:3], q.shape[2])
    scores = torch.matmul(q, k.transpose(-1, -2)) + torch.gather(about, dim=-1, index=places)
    return torch.matmul((scores / math.sqrt(2 * WIDTH)).softmax(-1), v)


def sam(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """SAM: a number for each query and row of keys, and one for each query and column of keys."""
    scores = (q * WIDTH**-0.5) @ k.transpose(-2, -1)
    b, h, n, _ = q.shape
    image = q.reshape(b * h, SIDE, SIDE, WIDTH)
    of_rows = torch.einsum("bhwc,hkc->bhwk", image, rel_h)
    of_columns = torch.einsum("bhwc,wkc->bhwk", image, rel_w)
    bias = of_rows[:, :, :, :, None] + of_columns[:, :, :, None, :]
    scores = scores.view(b * h, SIDE, SIDE, SIDE, SIDE) + bias
    return scores.view(b, h, n, n).softmax(-1) @ v


def gpsa(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """ConViT's positional logits w . (dx, dy, dx^2 + dy^2), added to the scores."""
    i, j = positions(q.shape[2])
    dx, dy = j % SIDE - i % SIDE, j // SIDE - i // SIDE
    far = dx**2 + dy**2
    w = w[:, :, None, None]
    return attend(q, k, v, w[0] * dx + w[1] * dy + w[2] * far)


def row_and_column(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return attend(q, k, v, rows[:, :, None] + columns[:, None, :])


def distance_2d(q: Tensor, k: Tensor, v: Tensor, points: Tensor, falloff: Tensor) -> Tensor:
    """-c * |x_i - x_j|^2 in the plane, coordinate by coordinate."""
    away = sum((points[:, :, None, n] - points[:, None, :, n]) ** 2 for n in range(2))
    return attend(q, k, v, -falloff[:, None, None] * away[:, None])


def distance_3d(q: Tensor, k: Tensor, v: Tensor, points: Tensor, falloff: Tensor) -> Tensor:
    away = sum((points[:, :, None, n] - points[:, None, :, n]) ** 2 for n in range(3))
    return attend(q, k, v, -falloff[:, None, None] * away[:, None])


def distance_summed(q: Tensor, k: Tensor, v: Tensor, points: Tensor, falloff: Tensor) -> Tensor:
    """The same, as a sum over the axis of coordinates."""
    away = (points[:, :, None, :] - points[:, None, :, :]).pow(2).sum(-1)
    return attend(q, k, v, -falloff[:, None, None] * away[:, None])


def pair_bias(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, mask: Tensor) -> Tensor:
    """AlphaFold: a pair bias for each head, and a key mask."""
    scores = torch.matmul(q * WIDTH**-0.5, k.transpose(-1, -2)) + (1e9 * (mask - 1))[:, None, None, :] + pair
    return torch.matmul(scores.softmax(-1), v)


def music(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    """Music Transformer: q times an embedding of each distance, skewed by padding and a view."""
    b, h, n, _ = q.shape
    about = functional.pad(q @ embedding.transpose(-1, -2), (1, 0)).view(b, h, n + 1, n)[:, :, 1:]
    i, j = positions(n)
    return ((q @ k.transpose(-1, -2) + about) * WIDTH**-0.5).masked_fill(j > i, -math.inf).softmax(-1) @ v


def transformer_xl(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Transformer-XL: (q + u) k plus (q + w) times an embedding of each distance, shifted."""
    b, h, n, _ = q.shape
    about = (q + w[:, None]) @ embedding.transpose(-1, -2)
    about = functional.pad(about, (1, 0)).view(b, h, n + 1, n)[:, :, 1:].view_as(about)
    i, j = positions(n)
    return (((q + u[:, None]) @ k.transpose(-1, -2) + about) * WIDTH**-0.5).masked_fill(j > i, -math.inf).softmax(-1) @ v
