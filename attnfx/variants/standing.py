"""Where a single query stands whose mask is data: at the last key that the mask lets it see, found on the device at each call.

A decode step of a model that is given a padding mask, or that has a cache of a fixed length, is such an attention: nothing about
its mask can be proved, and yet it says how far the cache is filled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import INDEX, Call, Int, Load
from attnfx.site import AttentionSite
from attnfx.variants import key_masks
from attnfx.variants.attend import Attend, Within, beside, read


def stood(site: AttentionSite) -> AttentionSite | None:
    """``site`` with one more side tensor, the last key (B,) that its mask lets the query see, and a mask that says so once more.

    None where there are several queries, where the mask tells the position, or tells it for each head, and in cross-attention,
    where a mask is no place in a sequence.
    """
    facts = site.facts
    if site.queries != 1 or facts.delta_low or not facts.rest or site.origin.relation == "cross":
        return None
    if expr.depends_on(site.keep, "h") or not key_masks.readable(site.keep):
        return None
    made, slot = beside(site, (site.batch,), torch.int64)
    last = read(slot, expr.index("b"), dtype=torch.int64)
    return made.replace(keep=expr.logical_and(site.keep, expr.le(expr.index("j"), last)))


def last_key(site: AttentionSite) -> Load | None:
    """The element that tells the last key, of a site that :func:`stood` made."""
    found = [
        term.args[1] for term in site.facts.rest if isinstance(term, Call) and term.op == "le" and term.args[0] == Int(INDEX["j"])
    ]
    ours = [e for e in found if isinstance(e, Load) and e.indices == (Int(INDEX["b"]),) and e.dtype == torch.int64]
    return ours[-1] if site.queries == 1 and ours else None


class Standing(Within):
    """The calls of ``whole`` with the tensor that ``site``, made by :func:`stood` of its site, has more."""

    def __init__(self, whole: Attend, site: AttentionSite) -> None:
        super().__init__(whole, site)
        kept = key_masks.kept(whole, whole.site.keep)  # (B or 1, 1, 1, N)
        places = torch.where(kept, whole.arange(whole.number(site.keys)), 0)
        last = torch.flatten(torch.amax(places, -1))
        self.last = torch.ops.aten.expand.default(last, [whole.number(site.batch)])
        self.loads = (*whole.loads, self.last)

    def __call__(self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        return self.whole(site, query, key, value, [self.last, *more])

    def with_lse(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        return self.whole.with_lse(site, query, key, value, [self.last, *more])
