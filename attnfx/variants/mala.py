"""MALA: linear attention whose weights know the magnitude of the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, features, linear
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant


@dataclass(frozen=True)
class MALA(Variant):
    """Weights (1 + 1 / (z_i + eps)) S_ij - z_i / n_i, with S_ij = s f(q_i).f(k_j) / n_i, z_i = sum_j S_ij and f = elu + 1.

    Sums over the n_i keys that the query sees: all of them, as in the paper, or those of a causal mask. A row adds up to one but
    for `eps`; a weight may be negative. s is the model's scale; where the model rotates queries and keys, f is of the rotated ones.
    """

    eps: float = 1e-6

    paper: ClassVar[str] = "Fan et al. 2025, Rectifying Magnitude Neglect in Linear Attention (arXiv:2507.00698)"
    exactness: ClassVar[str] = "another function than softmax, needs training"

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not self.eps >= 0:
            raise PolicyError(f"MALA.eps is {self.eps!r}; it must be a number that is not negative.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(), causal=False), Example(cls(), queries=9, causal=False, key_heads=4), Example(cls(0.01))

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*linear.objections(site, "MALA")]
        if site.facts.causal:
            found += linear.square(site, "causal MALA")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, causal = attend.site, attend.site.facts.causal
        f, g = features.elu(query) * (site.scale or 0.0), features.elu(key)
        # divided by their sums; with sums of the weights, wide
        made = torch.ops.attnfx.linear_attention_states.default(f, g, value, None, causal, True, 0.0)
        if causal:
            at = attend.arange(attend.number(site.queries)) + 1
            wide = torch.ops.aten.to.dtype(linear.spread(attend, value), self._wide(site))
            mean = torch.cumsum(wide, 2) / torch.unsqueeze(at, -1)
        else:
            mean = linear.spread(attend, torch.mean(value, 2, keepdim=True))
        z = (made[1] / (at if causal else attend.number(site.keys)))[..., None]
        # S v = z O of the normalised attention
        out = (z + z / (z + self.eps)) * made[0] - z * mean
        return torch.ops.aten.to.dtype(out, site.dtype)  # type: ignore[no-any-return]

    def _wide(self, site: AttentionSite) -> torch.dtype:
        return torch.float64 if site.dtype == torch.float64 else torch.float32

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return linear.pairs(site, site.head_dim)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        kept = dense.seen(q.shape[2], k.shape[2], causal, keep, q.device)
        f, g = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
        n = kept.sum(-1, keepdim=True)
        S = dense.scores(f, g, scale) / n * kept
        z = S.sum(-1, keepdim=True)
        return dense.mixed(((1 + 1 / (z + self.eps)) * S - z / n) * kept, v)
