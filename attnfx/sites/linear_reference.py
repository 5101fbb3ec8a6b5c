"""The plain meaning of an attention without a softmax over keys: the oracle of the tests, and its line of mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of
from attnfx.sites.feature_maps import FeatureMap
from attnfx.sites.notation import formula, mask

if TYPE_CHECKING:
    from attnfx.site import AttentionSite


def attention(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, loads: Sequence[torch.Tensor], sizes: Sequence[int]
) -> torch.Tensor:
    """``(w / divisor(l)) v`` with ``w = keep ? score(f(q)·g(k)) : 0`` and ``l = sum_j w`` (or ``sum_j |w|``); M x N tensors.

    q (B,H,M,D), k (B,Hk,N,D), v (B,Hk,N,Dv) -> (B,H,M,Dv), in the dtype of ``q``.
    """
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v = (t.repeat_interleave(groups, 1) if groups != 1 else t for t in (k, v))
    grid = grid_of(q.shape[0], q.shape[1], range(q.shape[2]), range(k.shape[2]), q.device)
    values: dict[sympy.Symbol, int] = dict(zip(site.symbols, sizes, strict=True))
    dots = site.query_map(q) @ site.key_map(k).transpose(-1, -2)
    w = evaluate(site.score, grid, loads, values, score=dots, dtype=q.dtype, clamp=True).expand(dots.shape)
    keep = evaluate(site.keep, grid, loads, values, clamp=True).expand(dots.shape)
    w = w.masked_fill(~keep, 0.0)
    if site.normaliser != "none":
        total = (w.abs() if site.normaliser == "abs_sum" else w).sum(-1, keepdim=True)
        w = w / evaluate(site.divisor, {**grid, "j": grid["j"][..., :1]}, loads, values, score=total, dtype=q.dtype, clamp=True)
    return w @ v


def line(site: AttentionSite) -> str:
    """``Σ_j w v / Σ_j w, w = elu(q)·elu(k) | causal``: everything in front of the sizes."""
    product = "q·k"
    if not (site.query_map.identity and site.key_map.identity):
        product = f"{_factor(site.query_map, 'q')}·{_factor(site.key_map, 'k')}"
    plain = isinstance(site.score, expr.Score)
    weight = product if plain else _with(site.score, product)
    kept = mask(site)
    text = f"w = {weight}" + ("" if kept == "full" else f" | {kept}")
    if site.normaliser == "none":
        return f"Σ_j w v, {text}"
    total = "Σ_j w" if site.normaliser == "sum" else "Σ_j |w|"
    below = _with(site.divisor, "l", 6)
    if isinstance(site.divisor, expr.Score):
        return f"Σ_j w v / {total}, {text}"
    held = " held constant" if site.divisor_detached else ""
    return f"Σ_j w v / {below}, l = {total}{held}, {text}"


def _with(e: expr.Expr, name: str, outer: int = 0) -> str:
    """The formula with ``name`` for the score."""
    named = expr.rebuild(e, lambda n: expr.Load("score", (), n.dtype) if isinstance(n, expr.Score) else None)
    text = formula(named, outer)
    bare = any(text.count(x) for x in ("(score[])", "|score[]|", "(score[],")) and "·" in name and text.count("score[]") == 1
    return text.replace("score[]", f"({name})" if "·" in name and not bare else name)


def _factor(m: FeatureMap, letter: str) -> str:
    text = m.notation(letter)
    return text if text == letter or (text.endswith(")") and text.find("(") > 0 and text.count("(") == 1) else f"({text})"
