"""What the variants of linear attention share: which attentions they can stand for, the call, its cost, and dense weights."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend


def objections(site: AttentionSite, what: str, causal: bool | None = None) -> tuple[str, ...]:
    """Why ``site`` is no plain attention, causal or full; ``what`` replaces it: "linear attention". ``causal``: it must be so, or
    must not."""
    found = []
    if site.scale is None or site.band is not None:
        found.append(f"The scores are more than q.k times a number, as with a bias or a softcap; {what} replaces plain scores.")
    if site.sink is not None or site.weight != expr.ONE:
        found.append(f"The softmax has a sink, or its probabilities a factor; {what} has no place for it.")
    if site.dropout > 0.0:
        found.append(f"There is dropout of {site.dropout:g}; {what} forms no probabilities to drop.")
    offset = site.facts.causal_offset
    ahead = sympy.expand(site.keys - site.queries)
    if not site.facts.full and (offset is None or sympy.expand(offset - ahead) != 0):
        found.append(
            f"The mask is not plainly causal with the last query at the last key; {what} serves causal and full attention."
        )
    elif site.facts.causal and not (ahead == 0 or (ahead.is_Integer and ahead > 0)):
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
