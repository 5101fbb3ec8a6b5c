"""What the variants of linear attention share: which attentions they can stand for, the call, its cost, and dense weights."""

from __future__ import annotations

import dataclasses

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, key_masks
from attnfx.variants.attend import Attend


def objections(site: AttentionSite, what: str, causal: bool | None = None, padded: bool = False) -> tuple[str, ...]:
    """Why ``site`` is no plain attention, causal or full; ``what`` replaces it: "linear attention". ``causal``: it must be so, or
    must not. ``padded``: a mask of data may hide keys from all queries, which :func:`shown` takes care of."""
    found, facts = [], site.facts
    if padded and key_masks.of_keys(expr.logical_and(*facts.rest)):
        facts = dataclasses.replace(facts, rest=())
    if site.scale is None or site.band is not None:
        found.append(f"The scores are more than q.k times a number, as with a bias or a softcap; {what} replaces plain scores.")
    if site.sink is not None or site.weight != expr.ONE:
        found.append(f"The softmax has a sink, or its probabilities a factor; {what} has no place for it.")
    if site.dropout > 0.0:
        found.append(f"There is dropout of {site.dropout:g}; {what} forms no probabilities to drop.")
    offset = facts.causal_offset
    ahead = sympy.expand(site.keys - site.queries)
    if not facts.full and (offset is None or sympy.expand(offset - ahead) != 0):
        found.append(
            f"The mask is not plainly causal with the last query at the last key; {what} serves causal and full attention."
        )
    elif facts.causal and not (ahead == 0 or (ahead.is_Integer and ahead > 0)):
        found.append(f"There are {site.queries} queries and {site.keys} keys; causal {what} needs at least as many keys.")
    if causal is not None and is_causal(site) != causal:
        kinds = ("is causal", "full") if is_causal(site) else ("is not causal", "causal")
        found.append(f"The attention {kinds[0]}; {what} is defined for {kinds[1]} attention here.")
    return tuple(found)


def of_logits(site: AttentionSite, what: str) -> tuple[str, ...]:
    """The same for what takes roots of the scale, and stands queries among keys also where all of them are seen."""
    found = objections(site, what) if is_causal(site) else (*objections(site, what), *square(site, what))
    if found or (site.scale or 0.0) > 0.0:
        return found
    return (f"The scale of the scores is {site.scale}; {what} needs a positive one.",)


def is_causal(site: AttentionSite) -> bool:
    """Whether queries see the keys up to their own alone: so does a single one, which stands at the last key."""
    return site.facts.causal or bool(site.queries == 1)


def square(site: AttentionSite, what: str) -> tuple[str, ...]:
    """Why there are not as many queries as keys, where ``what`` needs that."""
    if sympy.expand(site.keys - site.queries) == 0:
        return ()
    return (f"There are {site.queries} queries and {site.keys} keys; {what} needs as many of one as of the other.",)


def linear(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, decay: Tensor | None = None, normalize: bool = False, eps: float = 0.0,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """sum_j w v_j (B,H,M,DV), w = scale lam^(i-j) q_i.k_j over the seen keys; divided by sum_j w + eps to ``normalize``."""
    options = (causal, normalize, eps, None, None, "add", scale)
    out: Tensor = torch.ops.attnfx.linear_attention.default(query, key, value, decay, *options)
    return out


def attended(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None = None, normalize: bool = False,
    eps: float = 0.0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """:func:`linear` in place of the site of ``attend``, whose mask may hide keys from all queries."""
    site, key = attend.site, shown(attend, key)
    if decay is not None and site.queries == 1:
        key, value, decay = decayed(attend, key, decay), spread(attend, value), None
    return linear(query, key, value, is_causal(site), decay, normalize, eps, scale)


def shown(attend: Attend, key: Tensor) -> Tensor:
    """Features of keys (B,HK,N,D), zero where a mask of data hides the key from all queries."""
    rest = attend.site.facts.rest
    if not rest:
        return key
    kept = torch.reshape(key_masks.kept(attend, expr.logical_and(*rest)), (-1, 1, attend.number(attend.site.keys), 1))
    return torch.where(kept, key, torch.zeros_like(key))


def decayed(attend: Attend, key: Tensor, decay: Tensor) -> Tensor:
    """Features (B,H,N,D) of the keys of a single query, by how far they are behind it: lam^(p - j) with ``decay`` (H), log lam, and
    p the last key that a mask of data shows, or the last one."""
    site, at = attend.site, attend.arange(attend.number(attend.site.keys))
    last: Tensor | int = attend.number(site.keys) - 1
    if site.facts.rest:
        kept = key_masks.kept(attend, site.keep)
        last = torch.amax(torch.where(kept, at, 0), -1, keepdim=True)  # (B or 1,1,1,1)
    behind = torch.clamp(last - at, min=0) + torch.zeros_like(at)
    by = torch.exp(torch.reshape(decay, (1, -1, 1, 1)) * torch.reshape(behind, (-1, 1, attend.number(site.keys), 1)))
    return torch.ops.aten.to.dtype(spread(attend, key) * by, site.dtype)  # type: ignore[no-any-return]


def spread(attend: Attend, x: Tensor) -> Tensor:
    """Keys or values (B,HK,N,D) for each query head."""
    site = attend.site
    if site.heads == site.key_heads:
        return x
    return torch.repeat_interleave(x, attend.number(sympy.cancel(site.heads / site.key_heads)), 1)


def pairs(site: AttentionSite, width: sympy.Expr | int) -> sympy.Expr:
    """The pairs of a query and a key that cost what states of features of this width do."""
    each = sympy.Rational(1, site.head_dim + site.value_dim) * width * site.value_dim
    return sympy.expand((site.queries + site.keys) * each)


def mixed(w: Tensor, v: Tensor, kept: Tensor, normalize: bool, eps: float = 0.0) -> Tensor:
    """The oracle of :func:`linear` from dense weights (B,H,M,N)."""
    w = w * kept
    out = dense.mixed(w, v)
    return out / (w.sum(-1, keepdim=True) + eps) if normalize else out
