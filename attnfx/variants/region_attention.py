"""Attention inside of given regions of an image: region attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, positions, same_id
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant


@dataclass(frozen=True)
class RegionAttention(Variant):
    """Each query keeps the keys of its own region, of those the model lets it see; the scale stays the model's own.

    `regions`: the number of the region of each token, in the order of the tokens, or the path of a file with them (a JSON list
    or a tensor saved by torch; an image is read row after row). The same regions for every image of a batch and in every call.
    Tiles of tokens whose ranges of numbers are apart are skipped, so numbers that grow along the sequence save most.
    """

    regions: same_id.Ids

    paper: ClassVar[str] = "Yang et al. 2024, Region Attention Transformer for Medical Image Restoration (arXiv:2407.09268)"
    exactness: ClassVar[str] = "approximate, needs regions and training with them"

    def __post_init__(self) -> None:
        same_id.checked("RegionAttention.regions", self.regions)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        ids = tuple(int(x) for x in "0011222011122233311122200011122233344")
        return Example(cls(ids), causal=False), Example(cls(ids)), Example(cls(ids), queries=9), Example(cls(ids), queries=1)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        try:
            return same_id.objections(site, len(same_id.numbers(self.regions)), "regions")
        except PolicyError as error:
            return (str(error),)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(same_id.kept(attend.site), query, key, value, more=[same_id.table(same_id.numbers(self.regions))])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        """Of a number of queries that is not known those of the mean token."""
        ids, before = same_id.numbers(self.regions), Counter[int]()
        sizes, each = Counter(ids), []
        for own in ids:
            before[own] += 1
            each.append(before[own] if positions.ordered(site) else sizes[own])
        if not site.queries.is_Integer:
            return site.queries * sympy.Rational(sum(each), len(ids))
        return sympy.Integer(sum(each[len(ids) - int(site.queries) :]))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        one_hot = torch.nn.functional.one_hot(torch.tensor(same_id.numbers(self.regions), device=q.device))
        kept = (one_hot[N - M :] @ one_hot.T).bool()
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))
