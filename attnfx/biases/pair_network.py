"""Two small networks that make a bias of two tokens from features of one each: FlashBias' form for AlphaFold's pair bias.

    f_i = (mean_j z_ij, mean_j z_ji, z_ii)                   features of token i, from a pair representation z (P, N, N, C)
    phi(f) = W3 tanh(W2 tanh(W1 f + b1) + b2) + b3           a network of queries, another one of keys; H * R numbers a token
    bias_hij ~ phi_q(f_i)_h . (phi_k(f_j)_h - mean_j phi_k(f_j)_h)

The mean over the keys is taken out: the softmax does not see it, and a half would lose the rest beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: Weight and bias of each layer, in order.
Layers = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class PairNetwork:
    """``query`` and ``key``: the layers; ``heads``; ``error`` and ``largest``: root mean square and largest error of the
    row-centred bias, ``size`` the root mean square of that bias itself: what leaving it out would cost."""

    query: Layers
    key: Layers
    heads: int
    error: float
    largest: float
    size: float

    @property
    def channels(self) -> int:
        return self.query[0].shape[1] // 3

    @property
    def rank(self) -> int:
        return self.query[-1].shape[0] // self.heads


def features(pair: Tensor) -> Tensor:
    """(P, N, N, C) -> (P, N, 3 C) in float32."""
    means = [pair.mean(axis, dtype=torch.float32) for axis in (2, 1)]
    return torch.cat([*means, pair.diagonal(dim1=1, dim2=2).mT.float()], -1)


def network(layers: Layers, inputs: Tensor) -> Tensor:
    """(..., 3 C) -> (..., H * R)."""
    for k in range(0, len(layers), 2):
        inputs = functional.linear(inputs if k == 0 else inputs.tanh(), layers[k], layers[k + 1])
    return inputs


def factors(query: Layers, key: Layers, heads: int, found: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors (P, H, N, R) of the bias from features (P, N, 3 C); those of keys add up to zero over the keys."""
    made = (network(layers, found) for layers in (query, key))
    u, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in made)
    return u, v - v.mean(2, keepdim=True)
