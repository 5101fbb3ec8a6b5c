"""The rows of `benchmarks.derivations`: masks and biases from real models, with small inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import derivation_biases as biases
from benchmarks.derivation_biases import BATCH, HEADS, LOWEST, SIDE, WIDTH, WINDOW, Attend, positions

#: Tokens of a row, unless it is an image or a window.
LENGTH = 128


@dataclass(frozen=True)
class Row:
    """An attention, what it takes beside q, k and v, and how many tokens and batches. ``rank``: that of the bias, where one is
    known: products of a number of the query and one of the key, and numbers of the key."""

    name: str
    attend: Attend
    given: Callable[[], tuple[Tensor, ...]] = tuple
    length: int = LENGTH
    batch: int = BATCH
    rank: int | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v (B, H, S, D) and the rest, float32."""
        torch.manual_seed(0)
        q, k, v = (torch.randn(self.batch, HEADS, self.length, WIDTH) for _ in range(3))
        return q, k, v, *self.given()


def llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The dense mask that transformers builds from positions."""
    i, j = positions(q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i)[None, None])


def mistral(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=((j <= i) & (j > i - 40))[None, None])


def gpt2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    scores = (q @ k.transpose(-1, -2)) / WIDTH**0.5
    keep = torch.tril(torch.ones(n, n, dtype=torch.bool)).view(1, 1, n, n)
    return torch.where(keep, scores, LOWEST).softmax(-1) @ v


def bert(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return biases.attend(q, k, v, (1.0 - mask[:, None, None, :].float()) * LOWEST)


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) | (j < 32))


def documents(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    ids = ends.cumsum(-1)
    i, j = positions(q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(ids[:, None, :, None] == ids[:, None, None, :]) & (j <= i))


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama 4's local layers."""
    i, j = positions(q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(i // 32 == j // 32) & (j <= i))


def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=((i - j) % 4 == 0) & (j <= i) & (i - j < 64))


def neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows of 7 x 7 around each pixel: one predicate for each axis."""
    i, j = positions(q.shape[2])
    keep = ((i // SIDE - j // SIDE).abs() <= 3) & ((i % SIDE - j % SIDE).abs() <= 3)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def _slopes() -> tuple[Tensor, ...]:
    return (biases.slopes(),)


def _numbers(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) * 0.5 for shape in shapes)


def _padding() -> Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[-1, -LENGTH // 4 :] = 0
    return mask


def _ends() -> tuple[Tensor, ...]:
    ends = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    ends[:, [20, 50, 100]] = 1
    return (ends,)


def _windows(side: int, extra: int = 0) -> Tensor:
    """Swin's index of (side^2, side^2) into (2 side - 1)^2 places; with a class token BEiT's."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    away = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + side - 1
    inner = away[..., 0] * (2 * side - 1) + away[..., 1]
    return functional.pad(inner, (extra, 0, extra, 0), value=(2 * side - 1) ** 2)


def _swin(extra: int = 0) -> tuple[Tensor, ...]:
    return torch.randn((2 * WINDOW - 1) ** 2 + extra, HEADS), _windows(WINDOW, extra)


def _points(n: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(BATCH, LENGTH, n), torch.linspace(0.1, 1.0, HEADS))


IMAGE, SMALL = SIDE * SIDE, WINDOW * WINDOW
ROWS = (
    Row("llama causal", llama),
    Row("mistral window", mistral),
    Row("gpt2 tril", gpt2),
    Row("bert padding", bert, lambda: (_padding(),)),
    Row("prefix lm", prefix),
    Row("packed documents", documents, _ends),
    Row("llama 4 chunks", chunked),
    Row("dilated window", dilated),
    Row("2-d neighbourhood", neighbourhood, length=IMAGE),
    Row("bloom alibi", biases.bloom, lambda: (_padding(), biases.slopes()), rank=1),
    Row("mpt alibi", biases.mpt, rank=1),
    Row("causal alibi", biases.alibi, _slopes, rank=1),
    Row("symmetric alibi", biases.symmetric_alibi, _slopes),
    Row("kerple log", biases.kerple_log, lambda: (torch.rand(HEADS) + 0.1, torch.rand(HEADS) + 0.1)),
    Row("kerple power", biases.kerple_power, lambda: (torch.rand(HEADS) * 0.1,)),
    Row("sandwich", biases.sandwich, _slopes, rank=8),
    Row("sinusoid", biases.sinusoid, _slopes, rank=2),
    Row("fire", biases.fire, _numbers((HEADS,), (HEADS,), ())),
    Row("t5 buckets", biases.t5, _numbers((32, HEADS))),
    Row("swin table", biases.swin, _swin, SMALL, 64),
    Row("swin v2 network", biases.swin_v2, lambda: (*_swin(), torch.ones(HEADS, 1, 1)), SMALL, 64),
    Row("beit table", biases.beit, lambda: _swin(1), SMALL + 1, 64),
    Row("deberta c2p", biases.deberta, _numbers((HEADS, 64, WIDTH))),
    Row("sam decomposed", biases.sam, _numbers((SIDE, SIDE, WIDTH), (SIDE, SIDE, WIDTH)), IMAGE),
    Row("convit gpsa", biases.gpsa, lambda: (torch.randn(3, HEADS) * 0.1,), IMAGE, rank=3),
    Row("row and column", biases.row_and_column, _numbers((HEADS, LENGTH), (HEADS, LENGTH)), rank=1),
    Row("distance 2-d", biases.distance_2d, _points(2), rank=3),
    Row("distance 3-d", biases.distance_3d, _points(3), rank=4),
    Row("distance 3-d summed", biases.distance_summed, _points(3), rank=4),
    Row("pair bias", biases.pair_bias, lambda: (torch.randn(1, HEADS, LENGTH, LENGTH), _padding().float())),
    Row("music transformer", biases.music, _numbers((LENGTH, WIDTH))),
    Row("transformer-xl", biases.transformer_xl, _numbers((LENGTH, WIDTH), (HEADS, WIDTH), (HEADS, WIDTH))),
)
