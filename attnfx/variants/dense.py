"""Dense attention from its formula, out of which the oracles of the variants are made."""

from __future__ import annotations

import torch
from torch import Tensor


def seen(queries: int, keys: int, causal: bool, keep: Tensor | None, device: torch.device) -> Tensor:
    """Which keys the model itself lets each query see, (M, N) or as `keep` has it: the last query stands at the last key."""
    kept = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        kept = kept.tril(keys - queries)
    return kept if keep is None else kept & keep


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`scale` q.k, (B, H, M, N), from (B, H, M, D) and (B, G, N, D)."""
    return torch.einsum("bhid,bhjd->bhij", q, grouped(k, q)) * scale


def softmax(z: Tensor, kept: Tensor) -> Tensor:
    """Weights over the kept keys, (B, H, M, N); NaN where a query keeps none."""
    return z.masked_fill(~kept, float("-inf")).softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Tensor) -> Tensor:
    """softmax over the kept keys of `scale` q.k, times v: (B, H, M, E)."""
    return mixed(softmax(scores(q, k, scale), kept), v)


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    """Sums of values (B, G, N, E) by weights (B, H, M, N)."""
    return torch.einsum("bhij,bhje->bhie", weights, grouped(v, weights))


def grouped(x: Tensor, of: Tensor) -> Tensor:
    """Keys or values (B, G, N, D) repeated for the query heads of `of` (B, H, ...)."""
    return x.repeat_interleave(of.shape[1] // x.shape[1], 1)


def places(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The key at which each query stands, (M, 1), the last one at the last key; and the numbers of the keys, (N,)."""
    return torch.arange(queries, device=device)[:, None] + (keys - queries), torch.arange(keys, device=device)
