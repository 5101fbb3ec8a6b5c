"""Core-context-aware attention: far groups of keys as one core token each, near keys as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, summaries
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class CoreContext(Variant):
    """A query sees the last `local` keys, as far back as the beginning of their first group of `group_size`, and each group before
    as one core token.

    A core's key and value are the mean of the group's, weighed by the softmax of the group's last query with its keys. (The paper
    averages the layer's inputs, and projects the core; without rotation of positions that is the same, and keys are averaged
    here as the model rotated them.) Queries that share a key head are averaged to weigh. One softmax takes cores and keys.
    """

    group_size: int = 16
    local: int = 1024

    paper: ClassVar[str] = "Chen et al. 2024, Core Context Aware Attention for Long Context Language Modeling (arXiv:2412.12465)"
    exactness: ClassVar[str] = "approximate, better with fine-tuning"

    def __post_init__(self) -> None:
        whole_number(self, "group_size", least=1)
        whole_number(self, "local", least=1)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(4, 6)), Example(cls(5, 1)), Example(cls(3, 8), queries=41, keys=41, key_heads=4), Example(cls(16, 64))

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return summaries.objections(site, "core context", causal=True)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, size = attend.site, self.group_size
        count = int(site.keys) // size
        if count == 0 or int(site.keys) <= self.local:
            return attend(site, query, key, value)
        by = summaries.led(attend, query)[:, :, size - 1 : count * size : size]
        keys, parts = (torch.unflatten(x[:, :, : count * size], 2, (count, size)) for x in (key, value))
        cores, values = summaries.gathered(by, keys, parts, site.scale or 1.0)

        def first(i: Expr) -> Expr:
            """The group in which the near keys begin."""
            return expr.floordiv(i - expr.integer(self.local - 1), expr.integer(size))

        def seen(i: Expr, m: Expr) -> Expr:
            return expr.lt(m, first(i))

        def near(i: Expr, j: Expr) -> Expr:
            return expr.le(first(i), expr.floordiv(j, expr.integer(size)))

        return summaries.attended(attend, count, query, (cores, key), (values, value), seen, near)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(site.queries * (self.local + self.group_size + site.keys / (2 * self.group_size)), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        N, size, group = k.shape[2], self.group_size, q.shape[1] // k.shape[1]
        cores, values = [k[:, :, :0]], [v[:, :, :0]]
        for m in range(N // size):
            s = slice(m * size, (m + 1) * size)
            last = torch.unflatten(q[:, :, (m + 1) * size - 1], 1, (-1, group)).mean(2)
            weights = (scale * torch.einsum("bgd,bgjd->bgj", last, k[:, :, s])).softmax(-1)
            cores.append(torch.einsum("bgj,bgjd->bgd", weights, k[:, :, s])[:, :, None])
            values.append(torch.einsum("bgj,bgje->bge", weights, v[:, :, s])[:, :, None])
        i, j = torch.arange(N, device=q.device)[:, None], torch.arange(N, device=q.device)
        begin = ((i - self.local + 1).clamp(min=0) // size) * size
        far = (torch.arange(N // size, device=q.device) + 1) * size <= begin
        near = (j >= begin) & dense.seen(N, N, causal, keep, q.device)
        z = [dense.scores(q, torch.cat(cores, 2), scale), dense.scores(q, k, scale)]
        return summaries.stated(z, [far, near], [dense.grouped(torch.cat(values, 2), q), dense.grouped(v, q)])
