"""Products of queries with embeddings of distances, spelled as public models spell them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WIDTH = 8
SCALE = WIDTH**-0.5


def weighted(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v


def later(n: int) -> Tensor:
    return torch.arange(n)[None] > torch.arange(n)[:, None]


def padded(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    """Music Transformer in its shortest form; above the diagonal stand products of other queries."""
    b, h, n, _ = q.shape
    about = functional.pad(q @ embedding.transpose(-1, -2), (1, 0)).view(b, h, n + 1, n)[:, :, 1:]
    return weighted(((q @ k.transpose(-1, -2) + about) * SCALE).masked_fill(later(n), -math.inf), v)


def filled(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    """The causal mask stands in the second product alone, before it is added."""
    n = q.shape[2]
    about = functional.pad(q @ embedding.transpose(-1, -2), (1, 0)).view(*q.shape[:2], n + 1, n)[:, :, 1:]
    return weighted((q @ k.transpose(-1, -2) + about.masked_fill(later(n), -math.inf)) * SCALE, v)


def skewing(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """MusicTransformer-pytorch: what the skew would read from other queries is zero before, and the mask adds -1e9."""
    n = q.shape[2]
    left = table[max(0, table.shape[0] - n) :]
    about = torch.einsum("bhld,md->bhlm", [q, left])
    lengths = torch.arange(about.size(-1) - 1, about.size(-1) - about.size(-2) - 1, -1)
    about = ~(torch.arange(about.size(-1)).unsqueeze(0) < lengths.unsqueeze(1)) * about
    about = functional.pad(about, [1, 0, 0, 0, 0, 0, 0, 0])
    about = about.reshape(about.size(0), about.size(1), about.size(-1), about.size(-2))[:, :, 1:, :]
    logits = (torch.matmul(q, k.permute(0, 1, 3, 2)) + about) / math.sqrt(WIDTH)
    return weighted(logits + (later(n).to(torch.int64) * -1e9).to(logits.dtype), v)


def heads_first(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """MusicTransformer-Pytorch: heads in the batch, a float mask before the skew, everything in place."""
    b, h, n, _ = q.shape
    q, k, v = (t.reshape(b * h, n, -1) for t in (q * SCALE, k, v))
    logits = torch.bmm(q, k.transpose(1, 2))
    about = torch.einsum("hld,md->hlm", q, table[table.shape[0] - n :])
    about = (torch.triu(torch.ones(n, n, dtype=q.dtype)) == 1).to(q.dtype).flip(0) * about
    about = functional.pad(about, (1, 0, 0, 0, 0, 0))
    logits += about.reshape(about.shape[0], about.shape[2], about.shape[1])[:, 1:, :]
    mask = (torch.triu(torch.ones(n, n)) == 1).transpose(0, 1).to(q.dtype)
    logits += mask.masked_fill(mask == 0, -math.inf).masked_fill(mask == 1, 0.0).unsqueeze(0)
    return torch.bmm(logits.softmax(-1), v).view(b, h, n, -1)


def rel_shift(x: Tensor) -> Tensor:
    zeros = torch.zeros((x.size(0), 1, *x.size()[2:]), dtype=x.dtype)
    shape = (x.size(1) + 1, x.size(0), *x.size()[2:])
    return torch.cat([zeros, x], dim=1).view(*shape)[1:].view_as(x)


def with_memory(q: Tensor, k: Tensor, v: Tensor, r: Tensor, content: Tensor, position: Tensor) -> Tensor:
    """Transformer-XL in transformers: (i, b, h, d) layouts, a memory before the first query."""
    logits = torch.einsum("ibnd,jbnd->ijbn", q + content, k)
    logits = logits + rel_shift(torch.einsum("ibnd,jnd->ijbn", q + position, r))
    logits.mul_(SCALE)
    n, m = q.shape[0], k.shape[0]
    hidden = torch.triu(torch.ones(n, m), diagonal=1 + m - n).bool()[:, :, None, None]
    logits = logits.masked_fill(hidden, -1e30)
    return torch.einsum("ijbn,jbnd->ibnd", logits.softmax(1), v)


def both_ways(q: Tensor, k: Tensor, v: Tensor, p: Tensor, content: Tensor, position: Tensor) -> Tensor:
    """Conformer in transformers and espnet: 2 T - 1 distances, no mask, (b, t, h, d) layouts."""
    queries, about = (q + content).transpose(1, 2), (q + position).transpose(1, 2) @ p.transpose(1, 2).transpose(2, 3)
    zeros = torch.zeros((*about.size()[:3], 1), dtype=about.dtype)
    shifted = torch.cat([zeros, about], dim=-1).view(*about.size()[:2], about.shape[3] + 1, about.shape[2])
    about = shifted[:, :, 1:].view_as(about)[:, :, :, : about.size(-1) // 2 + 1]
    logits = (queries @ k.transpose(1, 2).transpose(-2, -1) + about) / math.sqrt(WIDTH)
    return weighted(logits, v.transpose(1, 2)).transpose(1, 2)


def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """BERT's relative keys: the embedding of every pair's distance, (l, r, d)."""
    n = q.shape[2]
    distance = torch.arange(n).view(-1, 1) - torch.arange(n).view(1, -1)
    vectors = functional.embedding(distance + table.shape[0] // 2, table).to(q.dtype)
    return weighted((q @ k.transpose(-1, -2) + torch.einsum("bhld,lrd->bhlr", q, vectors)) / math.sqrt(WIDTH), v)


def clipped(q: Tensor, k: Tensor, v: Tensor, table: Tensor, keep: Tensor) -> Tensor:
    """Wav2Vec2-BERT through torch's attention: distances clipped, the product inside of the mask that is added."""
    n = q.shape[2]
    distance = (torch.arange(n).view(1, -1) - torch.arange(n).view(-1, 1)).clamp(-4, 2)
    about = torch.einsum("bhld,lrd->bhlr", q, functional.embedding(distance + 4, table)) * SCALE
    about = about.masked_fill(~keep[:, None, None], torch.finfo(q.dtype).min)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=about)


def content_to_position(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The first half of DeBERTa's disentangled attention: products with all embeddings, gathered by distance."""
    n, span = q.shape[2], table.shape[0] // 2
    at = torch.clamp(torch.arange(n)[:, None] - torch.arange(n) + span, 0, 2 * span - 1).expand(*q.shape[:2], n, n)
    logits = q @ k.transpose(-1, -2) / math.sqrt(3 * WIDTH)
    return weighted(logits + torch.gather(q @ table.transpose(-1, -2), -1, at) / math.sqrt(3 * WIDTH), v)


@dataclass(frozen=True)
class Spelling:
    """A model and the shapes of its tensors for n positions; ``left``: it multiplies something else than the queries;
    ``keep``: its last argument is a mask of keys."""

    model: Callable[..., Tensor]
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]
    left: bool = False
    keep: bool = False

    def tensors(self, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        made = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in self.shapes(n)]
        return [*made, torch.arange(n) < torch.tensor([[n], [n - 1]])] if self.keep else made


B, H, W = 2, 3, WIDTH


def heads(n: int, *table: int) -> tuple[tuple[int, ...], ...]:
    return (B, H, n, W), (B, H, n, W), (B, H, n, W), (*table, W)


SPELLINGS = {
    "padded": Spelling(padded, lambda n: heads(n, n)),
    "padded, of each head": Spelling(padded, lambda n: heads(n, H, n)),
    "filled": Spelling(filled, lambda n: heads(n, n)),
    "skewing": Spelling(skewing, lambda n: heads(n, n + 5)),
    "heads first": Spelling(heads_first, lambda n: heads(n, n + 5)),
    "with memory": Spelling(
        with_memory,
        lambda n: ((n, B, H, W), (n + 3, B, H, W), (n + 3, B, H, W), (n + 3, H, W), (H, W), (H, W)),
        left=True,
    ),
    "both ways": Spelling(
        both_ways, lambda n: (*((B, n, H, W),) * 3, (1, 2 * n - 1, H, W), (H, W), (H, W)), left=True
    ),
    "gathered": Spelling(gathered, lambda n: heads(n, 2 * n + 5)),
    "clipped": Spelling(clipped, lambda n: heads(n, 7), keep=True),
    "content to position": Spelling(content_to_position, lambda n: heads(n, 8)),
}  # fmt: skip
