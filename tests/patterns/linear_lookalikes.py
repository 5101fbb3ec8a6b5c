"""Products of matrices that are no attention, though they look like one without a softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from linear_spellings import CROSS, B, D, E, H, N, S, t
from torch import Tensor, nn


class Chain(nn.Module):
    """x W1 W2 with parameters: a factorised layer."""

    def __init__(self, batched: bool = False, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        lead = (B,) if batched else ()
        self.first, self.second = nn.Parameter(torch.randn(*lead, D, N)), nn.Parameter(torch.randn(*lead, N, E))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.first
        return (self.activation(h) if self.activation else h) @ self.second


class Memory(nn.Module):
    """A low-rank map normalised over its rank: keys and values are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(torch.rand(N, D)), nn.Parameter(torch.rand(N, E))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.relu(x @ self.key.T)
        return (w @ self.value) / (w.sum(-1, keepdim=True) + 1e-6)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, N), nn.Linear(N, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def bilinear_pooling(x: Tensor, y: Tensor) -> Tensor:
    return t(x) @ y / N


def gram(x: Tensor) -> Tensor:
    return x @ t(x)


def power_iteration(x: Tensor) -> Tensor:
    return x @ (t(x) @ x)


def hypernetwork(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Weights of a layer made per sample: batch x in x hidden, batch x hidden x out."""
    return torch.relu(x @ first) @ second


def graph_convolution(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return a @ (a @ x) + y


def pooled_adjacency(s: Tensor, a: Tensor) -> Tensor:
    s = s.softmax(-1)
    return t(s) @ a @ s


def frames(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a @ b @ c


def whitening(q: Tensor, x: Tensor) -> Tensor:
    """A covariance applied to other vectors."""
    return q @ (t(x) @ x) / N


def four_matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.einsum("bij,bjk,bkl,blm->bim", a, b, c, d)


def channel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XCiT: a softmax of D x D; an attention over channels, with a softmax."""
    return (F.normalize(q, dim=-1) @ t(F.normalize(k, dim=-1))).softmax(-1) @ v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ t(k) / 2).softmax(-1) @ v


def integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.long() @ t(k.long()) @ v.long()).double()


def twice_normalised(x: Tensor, y: Tensor) -> Tensor:
    return (x / x.sum(-1, keepdim=True)) @ (y / y.norm(dim=-1, keepdim=True))


def unbatched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ k.T @ v


LOOKALIKES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "two matrices of parameters": (Chain(), ((B, S, D),)),
    "batched parameters": (Chain(batched=True), ((B, S, D),)),
    "a layer of a perceptron": (Chain(activation=torch.relu), ((B, S, D),)),
    "linear layers": (Projections(), ((B, S, D),)),
    "a normalised memory of parameters": (Memory(), ((B, S, D),)),
    "bilinear pooling": (bilinear_pooling, ((B, N, D), (B, N, E))),
    "a Gram matrix": (gram, ((B, N, D),)),
    "power iteration": (power_iteration, ((B, N, D),)),
    "a hypernetwork": (hypernetwork, ((B, S, D), (B, D, N), (B, N, E))),
    "a graph convolution": (graph_convolution, ((B, N, N), (B, N, D), (B, N, D))),
    "pooled adjacency": (pooled_adjacency, ((B, N, D), (B, N, N))),
    "composed frames": (frames, ((B, 3, 3),) * 3),
    "a covariance": (whitening, ((B, S, D), (B, N, D))),
    "four matrices": (four_matrices, ((B, S, D), (B, D, N), (B, N, E), (B, E, D))),
    "softmax attention": (softmax_attention, CROSS),
    "channel attention": (channel_attention, ((B, H, D, N),) * 3),
    "integers": (integers, CROSS),
    "normalised rows": (twice_normalised, ((B, S, D), (B, D, E))),
    "three matrices without a batch": (unbatched, ((S, D), (N, D), (N, E))),
}
