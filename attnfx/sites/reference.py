"""The plain meaning of an attention with a softmax over keys: the oracle of the tests, with S x S tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of
from attnfx.sites import band, skipping

if TYPE_CHECKING:
    from attnfx.site import AttentionSite


def attention(
    site: AttentionSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning of ``site`` in the dtype of ``q``, with S x S tensors: q (B,H,M,D), k (B,Hk,N,D), v (B,Hk,N,Dv) ->
    (B,H,M,Dv), and the natural LSE (B,H,M)."""
    if site.order is not None:
        q, k, v = (site.order.moved(t) for t in (q, k, v))
        out, lse = attention(site.replace(order=None), q, k, v, loads, sizes)
        return site.order.back(out), site.order.back(lse.unsqueeze(-1)).squeeze(-1)
    heads, groups = q.shape[1], q.shape[1] // max(k.shape[1], 1)
    k, v = (t.repeat_interleave(groups, 1) if groups != 1 else t for t in (k, v))
    grid = grid_of(q.shape[0], heads, range(q.shape[2]), range(k.shape[2]), q.device)
    values = dict(zip(site.symbols, sizes, strict=True))
    dots = q @ k.transpose(-1, -2)
    if site.band is not None:
        dots = dots + band.dense(site.band, q, k.shape[2], loads, values)
    z = evaluate(site.score, grid, loads, values, score=dots, dtype=q.dtype, clamp=True).expand(dots.shape)
    keep = evaluate(site.keep, grid, loads, values, clamp=True).expand(dots.shape)
    z = z + torch.where(keep, z.new_zeros(()), z.new_full((), site.fill)) if site.additive else z.masked_fill(~keep, site.fill)
    if site.skip is not None:
        kept = z.masked_fill(~keep, float("-inf"))
        some = (kept > float("-inf")).any(-1, keepdim=True)  # a row of nothing but fills is the model's own
        z = z.masked_fill(skipping.left_out(site.skip, kept, z.shape[3], groups) & some, float("-inf"))
    if site.sink is not None:
        one_key = {**grid, "j": grid["j"].new_zeros(1, 1, 1, 1)}
        sink = evaluate(site.sink, one_key, loads, values, dtype=q.dtype, clamp=True).to(q.dtype)
        z = torch.cat([z, sink.expand(*z.shape[:3], 1)], -1)
    lse = z.logsumexp(-1)
    weights = z.softmax(-1) if site.normaliser == "softmax" else (z - z.detach().amax(-1, keepdim=True)).exp()
    if site.empty_rows == "zero":
        weights = weights.masked_fill((z == float("-inf")).all(-1, keepdim=True), 0.0)
    weights = weights[..., : k.shape[2]]
    if site.weight != expr.ONE:
        weights = weights * evaluate(site.weight, grid, loads, values, dtype=q.dtype, clamp=True).to(q.dtype)
    return weights @ v, lse
