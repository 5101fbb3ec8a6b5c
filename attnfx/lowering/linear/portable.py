"""Linear attention in torch operations: one chunk of queries and keys after the other, beside a state, in any floating type.

Backward goes over the chunks twice, onwards with the state and back with its gradient, so nothing is kept but the operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

#: Tokens of a chunk: the scores inside of one cost about what the state does.
CHUNK = 128
#: What divides, of the sum l of a row's weights: l + eps, max(l, eps) or max(|l|, eps); held: a constant to gradients.
DIVISORS = ("add", "max", "max_abs", "add held", "max held", "max_abs held")


class Result(NamedTuple):
    """O (B,H,M,DV); the sums of the weights (B,H,M), without eps; the state (B,H,D,DV) and its sums (B,H,D) behind the last key.
    All but O are float32, or float64; both kinds of sums are empty where nothing is normalised."""

    out: Tensor
    sums: Tensor
    state: Tensor
    state_sums: Tensor


class _Chunk:
    """Tokens ``start`` to ``end``, and what decays inside: ``tile`` lam^(i-j), ``since`` lam^(i+1), ``until`` lam^(n-1-j)
    and ``whole`` lam^n, each with heads in front (H, n, n), (H, n, 1), (H, n, 1), (H, 1, 1); numbers, and no tile,
    where nothing decays."""

    def __init__(self, start: int, end: int, decay: Tensor | None, like: Tensor) -> None:
        self.start, self.end, n = start, end, end - start
        self.like, self.log = like, None if decay is None else decay.to(like.dtype)[:, None, None]
        self.since = self.until = self.whole = like.new_ones(1, 1, 1)
        if self.log is not None:
            at = torch.arange(n, device=like.device)[:, None]
            self.since, self.until, self.whole = (torch.exp(self.log * p) for p in (at + 1, n - 1 - at, n))

    @cached_property
    def tile(self) -> Tensor | None:
        if self.log is None:
            return None
        at = torch.arange(self.end - self.start, device=self.like.device)
        return torch.exp(self.log * (at[:, None] - at).clamp(min=0))

    def decayed(self, pairs: Tensor) -> Tensor:
        """(.., n, n) with what is decayed and zeros for keys that are not seen, whatever is there."""
        return (pairs if self.tile is None else pairs * self.tile).tril()

    def moved(self, start: int) -> _Chunk:
        """The chunk of as many tokens from ``start`` on, with the same tile."""
        other = copy(self)
        other.tile = self.tile
        other.start, other.end = start, start + self.end - self.start
        return other

    def of(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """The tokens of ``x`` (B,G,S,D) in a wide type, for each query head: (B,H,n,D)."""
        part = x[:, :, self.start : self.end].to(dtype)
        return part if x.shape[1] == heads else part.repeat_interleave(heads // x.shape[1], 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, state_sums: Tensor | None, causal: bool,
    normalize: bool, eps: float, divisor: str,
) -> Result:  # fmt: skip
    """The result from q (B,H,M,D), k (B,HK,N,D), v (B,HK,N,DV), log-decays (H) and what was before: a state and its sums, or zeros.

    Where ``causal``, M is N; where not, a decay serves the state alone and M is 0. Differentiable by torch, chunk for chunk.
    """
    wide, heads = wide_of(q), q.shape[1]
    S, z = _begun(q, v, state, state_sums, normalize)
    outs, totals = [], []
    if not causal:
        c = _Chunk(0, k.shape[2], decay if q.shape[2] == 0 else None, S)
        keys = c.of(k, heads, wide) * c.until
        S, z = S * c.whole + keys.transpose(2, 3) @ c.of(v, heads, wide), z * c.whole[..., 0] + keys.sum(2) if normalize else z
        queries = q.to(wide)
        outs.append(queries @ S)
        totals.append((queries @ z[..., None])[..., 0] if normalize else z)
    for c in _chunks(q.shape[2], decay, S) if causal else ():
        queries, keys, values = c.of(q, heads, wide), c.of(k, heads, wide), c.of(v, heads, wide)
        A = c.decayed(queries @ keys.transpose(2, 3))
        outs.append(A @ values + (queries @ S) * c.since)
        kept = keys * c.until
        S = S * c.whole + kept.transpose(2, 3) @ values
        if normalize:
            totals.append(A.sum(-1) + (queries @ z[..., None] * c.since)[..., 0])
            z = z * c.whole[..., 0] + kept.sum(2)
    if not outs:  # no query
        return Result(v.new_empty((*q.shape[:3], v.shape[3])), S.new_empty(q.shape[:3] if normalize else (0,)), S, z)
    sums = torch.cat(totals, -1) if normalize else z.new_empty(0)
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    return Result((out / divided_by(sums, eps, divisor)[..., None] if normalize else out).to(v.dtype), sums, S, z)


def backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, state_sums: Tensor | None, out: Tensor,
    sums: Tensor, grad_out: Tensor, grad_sums: Tensor | None, grad_state: Tensor | None, grad_state_sums: Tensor | None,
    causal: bool, normalize: bool, eps: float, divisor: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, the state and its sums, in their dtypes and shapes; of a state that was not given, one of zeros."""
    wide, heads, key_heads = wide_of(q), q.shape[1], k.shape[1]
    groups = heads // key_heads
    S, z = _begun(q, v, state, state_sums, normalize)
    P, p = _begun(q, v, grad_state, grad_state_sums, normalize)
    dq, dk, dv = (laid_like(t, t.shape[3], t.dtype) for t in (q, k, v))
    G, g = upstream(out, sums, grad_out, grad_sums, normalize, eps, divisor)

    def rows(c: _Chunk) -> tuple[Tensor, Tensor | None]:
        """The chunk's gradients of numerators (B,H,n,DV) and of denominators (B,H,n,1)."""
        G_, g_ = c.of(grad_out, heads, wide), None
        if normalize:
            G_, g_ = G_ * G[:, :, c.start : c.end, None], g[:, :, c.start : c.end, None]
        return G_, g_

    def keep(c: _Chunk, grad: Tensor, of: Tensor) -> None:
        of[:, :, c.start : c.end] = (
            grad if heads == key_heads else grad.reshape(grad.shape[0], key_heads, groups, *grad.shape[2:]).sum(2)
        )

    if not causal:
        c = _Chunk(0, k.shape[2], decay if q.shape[2] == 0 else None, S)
        over = _Chunk(0, q.shape[2], None, S)
        keys, values, queries = c.of(k, heads, wide), c.of(v, heads, wide), over.of(q, heads, wide)
        G_, g_ = rows(over)
        S = S + keys.transpose(2, 3) @ values
        dq[:] = G_ @ S.transpose(2, 3)
        P = P + queries.transpose(2, 3) @ G_
        by_keys = values @ P.transpose(2, 3)
        if g_ is not None:
            dq += (g_ * (z + keys.sum(2))[:, :, None]).to(q.dtype)
            p = p + (queries * g_).sum(2)
            by_keys = by_keys + p[:, :, None]
        keep(c, by_keys * c.until, dk)
        keep(c, keys @ P * c.until, dv)
        return [dq, dk, dv, P * c.whole, p * c.whole[..., 0] if normalize else p]
    chunks = list(_chunks(q.shape[2], decay, S))
    for c in chunks:
        keys, values = c.of(k, heads, wide), c.of(v, heads, wide)
        G_, g_ = rows(c)
        W, inter = G_ @ values.transpose(2, 3), G_ @ S.transpose(2, 3)
        kept = keys * c.until
        S = S * c.whole + kept.transpose(2, 3) @ values
        if g_ is not None:
            W, inter = W + g_, inter + g_ * z[:, :, None]
            z = z * c.whole[..., 0] + kept.sum(2)
        dq[:, :, c.start : c.end] = c.decayed(W) @ keys + inter * c.since
    for c in reversed(chunks):
        queries, keys, values = c.of(q, heads, wide), c.of(k, heads, wide), c.of(v, heads, wide)
        G_, g_ = rows(c)
        A, W, inter = queries @ keys.transpose(2, 3), G_ @ values.transpose(2, 3), values @ P.transpose(2, 3)
        if g_ is not None:
            W, inter = W + g_, inter + p[:, :, None]
        keep(c, c.decayed(W).transpose(2, 3) @ queries + inter * c.until, dk)
        keep(c, c.decayed(A).transpose(2, 3) @ G_ + keys @ P * c.until, dv)
        since = queries * c.since
        P = P * c.whole + since.transpose(2, 3) @ G_
        if g_ is not None:
            p = p * c.whole[..., 0] + (since * g_).sum(2)
    return [dq, dk, dv, P, p]


def upstream(
    out: Tensor, sums: Tensor, grad_out: Tensor, grad_sums: Tensor | None, normalize: bool, eps: float, divisor: str
) -> tuple[Tensor, Tensor]:
    """What dO is multiplied with for the gradient of the numerators, and the gradient of the sums: (B,H,M) each."""
    if not normalize:
        return sums, sums
    r = 1.0 / divided_by(sums, eps, divisor)
    delta = (out.to(r.dtype) * grad_out.to(r.dtype)).sum(-1)
    return r, gradient_of_sums(delta, r, sums, grad_sums, eps, divisor)


def divided_by(sums: Tensor, eps: float, divisor: str) -> Tensor:
    """What divides a row, of the sum of its weights: one of :data:`DIVISORS`."""
    kind, _, held = divisor.partition(" ")
    sums = sums.detach() if held else sums
    return sums + eps if kind == "add" else (sums if kind == "max" else sums.abs()).clamp(min=eps)


def gradient_of_sums(delta: Tensor, r: Tensor, sums: Tensor, grad_sums: Tensor | None, eps: float, divisor: str) -> Tensor:
    """The gradient of the sums from ``delta``, sum_e dO O, and ``r``, what rows are multiplied with."""
    kind, _, held = divisor.partition(" ")
    made = torch.zeros_like(delta) if held else -delta * r
    if kind == "max" and not held:
        made = made * (sums >= eps)
    elif kind == "max_abs" and not held:
        made = made * sums.sign() * (sums.abs() >= eps)
    return made if grad_sums is None else grad_sums + made


def laid_like(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (B,H,S,``width``) with the heads of a token beside each other if ``x`` (B,H,S,D) has them so: as models go on."""
    batch, heads, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, tokens, heads, width), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, heads, tokens, width), dtype=dtype)


def wide_of(x: Tensor) -> torch.dtype:
    """The type that sums are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _begun(q: Tensor, v: Tensor, state: Tensor | None, sums: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor]:
    """A state (B,H,D,DV) and its sums (B,H,D), zeros where none is given; no sums at all where nothing is normalised."""
    wide, (batch, heads, _, d) = wide_of(q), q.shape

    def copied(x: Tensor | None, *shape: int) -> Tensor:
        made = q.new_zeros(shape, dtype=wide)
        return made if x is None else made.copy_(x)

    begun = copied(state, batch, heads, d, v.shape[3])
    return begun, copied(sums, batch, heads, d) if normalize else q.new_zeros((0,), dtype=wide)


def _chunks(tokens: int, decay: Tensor | None, like: Tensor) -> Iterator[_Chunk]:
    made: _Chunk | None = None
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        alike = made is not None and end - start == made.end - made.start
        made = made.moved(start) if alike and made is not None else _Chunk(start, end, decay, like)
        yield made
