"""BiFormer's attention, which is routed from regions to regions of an image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import boxed, boxes, dense
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number
from attnfx.variants.boxes import Boxes


@dataclass(frozen=True)
class BiLevelRouting(Variant):
    """An image of `layout` = (rows, columns), in the order of rows, has `n_win` x `n_win` regions. Each token sees the tokens of
    the `topk` regions whose mean key has the largest product with the mean query of its own region, over all heads together.

    The choice passes no gradient. The convolution of the values that the paper's layer adds has weights of its own, and is no part
    of this. Keys and values of the chosen regions are copied: `topk` times what the keys and values are.
    """

    layout: tuple[int, ...]
    n_win: int = 7
    topk: int = 4

    paper: ClassVar[str] = "Zhu et al. 2023, BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv:2303.08810)"
    exactness: ClassVar[str] = "approximate; models are trained with it"

    def __post_init__(self) -> None:
        boxes.check_layout(self, ranks=(2,))
        whole_number(self, "n_win", least=1)
        whole_number(self, "topk", least=1)
        if any(n % self.n_win for n in self.layout):
            raise PolicyError(f"BiLevelRouting.n_win is {self.n_win}; it must divide the layout, {self.layout}.")
        if self.topk > self.n_win**2:
            raise PolicyError(f"BiLevelRouting.topk is {self.topk}; there are {self.n_win**2} regions.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((6, 9), 3, 2), 54, 54, causal=False), Example(cls((8, 4), 2, 1), 32, 32, causal=False),
            Example(cls((4, 6), 2, 4), 24, 24, causal=False),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = list(boxes.objections(site, self.layout))
        free, causal = boxed.movable(site)
        if causal or not free:
            found.append("A mask or a bias of the model knows the places of the tokens; regions are attended apart, without one.")
        elif site.side:
            found.append(f"The attention reads {len(site.side)} further tensors; regions are attended apart, without one.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, regions = attend.site, self.n_win**2
        cells = boxes_of(self).cells // regions
        by_region = boxed.in_order(boxes_of(self))
        query, key, value = (torch.unflatten(by_region.moved(attend, x), 2, [regions, cells]) for x in (query, key, value))
        places = self._routed(query, key, int(site.heads) // int(site.key_heads))  # (B, R, topk)
        first = torch.mul(attend.arange(attend.number(site.batch)), regions)
        places = torch.flatten(torch.add(places, torch.unflatten(first, 0, [-1, 1, 1])))

        def routed(x: Tensor) -> Tensor:
            """(B, G, R, n, D) as (B R, G, topk n, D): what the tokens of each region see."""
            each = torch.index_select(torch.flatten(torch.transpose(x, 1, 2), 0, 1), 0, places)
            return torch.flatten(torch.transpose(torch.unflatten(each, 0, [-1, self.topk]), 1, 2), 2, 3)

        numbers = {"queries": sympy.Integer(cells), "keys": sympy.Integer(self.topk * cells)}
        own = torch.flatten(torch.transpose(query, 1, 2), 0, 1)
        out = attend(site.replace(batch=site.batch * regions, **numbers), own, routed(key), routed(value))
        out = torch.flatten(torch.transpose(torch.unflatten(out, 0, [-1, regions]), 1, 2), 2, 3)
        return by_region.back(attend, out)

    def _routed(self, query: Tensor, key: Tensor, group: int) -> Tensor:
        """(B, R, topk): the regions that each one sees, from (B, H, R, n, D) and (B, G, R, n, D)."""
        q, k = (torch.mean(torch.detach(x), 3) for x in (query, key))
        products = torch.matmul(q, torch.transpose(torch.repeat_interleave(k, group, 1), 2, 3))
        return torch.topk(torch.sum(products, 1), self.topk)[1]

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return site.queries * site.keys * self.topk / self.n_win**2

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        rows, columns = (n // self.n_win for n in self.layout)
        number = torch.arange(q.shape[2]).view(self.layout)
        places = [(r * rows, c * columns) for r in range(self.n_win) for c in range(self.n_win)]
        members = [number[r : r + rows, c : c + columns].flatten() for r, c in places]
        kept = torch.zeros(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        for b in range(len(q)):
            wide = [dense.grouped(k, q)[b, :, at].detach().mean(1).flatten() for at in members]  # heads side by side
            for at in members:
                mine = q[b, :, at].detach().mean(1).flatten()
                best = sorted(range(len(members)), key=lambda n: -float(mine @ wide[n]))[: self.topk]
                kept[b, 0, at[:, None], torch.cat([members[n] for n in best])] = True
        return dense.attention(q, k, v, scale, kept & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))


@lru_cache(maxsize=64)
def boxes_of(variant: BiLevelRouting) -> Boxes:
    return Boxes(tuple(boxes.parted(n, tuple(range(0, n, n // variant.n_win))) for n in variant.layout))
