"""Each head sees its own shard of the context in blocks: S2-Attention's heterogeneous context sharding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, head_tables, positions
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class Sharded(Variant):
    """Key head g keeps the nearest `local_blocks` blocks of keys, and one block of every `vert_stride`, another one in each head.

    Queries and keys are cut into blocks of `block` at their places. A pair of blocks I (of the query) and J is kept iff I - J <
    local_blocks or (J + g step + offset) mod vert_stride = 0, with step = max(1, vert_stride // key heads): absolute blocks,
    which a cache of keys can drop for good. Where queries see keys on both sides it is |I - J| < local_blocks, and J - I in
    place of J; a single query is taken for a step of decoding. The query heads of one key head keep the same; the last
    `num_dense_heads` key heads keep everything.
    """

    block: int = 64
    local_blocks: int = 16
    vert_stride: int = 8
    num_dense_heads: int = 0
    offset: int = 0

    paper: ClassVar[str] = "Lin et al. 2024, S2-Attention: Hardware-Aware Context Sharding Among Attention Heads (arXiv:2407.17678)"
    exactness: ClassVar[str] = "approximate, needs training or fine-tuning"

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("local_blocks", 1), ("vert_stride", 1), ("num_dense_heads", 0), ("offset", 0)):
            whole_number(self, name, least)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(3, 2, 4)), Example(cls(4, 1, 3, num_dense_heads=1, offset=1)), Example(cls(5, 2, 6), queries=19),
            Example(cls(2, 2, 5), causal=False), Example(cls(4, 1, 4), queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if not (site.heads.is_Integer and site.key_heads.is_Integer):
            return (f"The {site.heads} heads and {site.key_heads} key heads are not known; each has a shard of its own.",)
        if self.num_dense_heads > site.key_heads:
            return (f"{self.num_dense_heads} heads are to be dense; the site has {site.key_heads} key heads.",)
        return positions.objections(site, "a shard")

    def apply(self, site: AttentionSite) -> AttentionSite:
        heads, key_heads = int(site.heads), int(site.key_heads)
        group, both = heads // key_heads, not site.facts.delta_low and site.queries != 1
        I, J = (expr.floordiv(x, expr.integer(self.block)) for x in (positions.position(site), expr.index("j")))
        local = [expr.le(d, expr.integer(self.local_blocks - 1)) for d in ([I - J, J - I] if both else [I - J])]
        shift = expr.floordiv(expr.index("h"), expr.integer(group)) * self._step(key_heads) + self.offset
        shard = expr.eq(expr.mod((J - I if both else J) + shift, expr.integer(self.vert_stride)), expr.integer(0))
        is_dense = head_tables.of_heads(range(heads - self.num_dense_heads * group, heads))
        return site.replace(keep=expr.logical_and(site.keep, expr.logical_or(is_dense, shard, expr.logical_and(*local))))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        everything = super().pairs(site)
        local = site.queries * self.local_blocks * self.block * (1 if positions.ordered(site) else 2)
        part = sympy.Rational(self.num_dense_heads, int(site.key_heads))
        return part * everything + (1 - part) * sympy.Min(local + everything / self.vert_stride, everything)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        position, j = dense.places(M, N, q.device)
        I, J, absolute = position // self.block, j // self.block, causal or M == 1
        kept = []
        for g in range(k.shape[1]):
            local = (I - J).abs() < self.local_blocks
            shard = ((J if absolute else J - I) + g * self._step(k.shape[1]) + self.offset) % self.vert_stride == 0
            everything = torch.full_like(local, g >= k.shape[1] - self.num_dense_heads)
            kept += [everything | local | shard] * group
        return dense.attention(q, k, v, scale, torch.stack(kept) & dense.seen(M, N, causal, keep, q.device))

    def _step(self, heads: int) -> int:
        return max(1, self.vert_stride // heads)
