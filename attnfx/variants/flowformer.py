"""Flow attention: linear attention in which keys compete for, and queries share, what flows between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, linear
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant


@dataclass(frozen=True)
class Flowformer(Variant):
    """Q and K through a sigmoid; flows I_i = q_i . sum_j k_j into queries and U_j = k_j . sum_i q_i out of keys, each kept at one:

        I'_i = q_i . sum_j k_j / U_j     U'_j = clamp(k_j . sum_i q_i / I_i, -1, 1)
        O_i = sigmoid(I'_i M / N) (q_i / I_i) . sum_j k_j^T (N softmax_j(U'_j) v_j)

    `eps` is added to both vectors of each product of a flow, as the authors' code does. Causal: every sum is over tokens up to
    its own, and what a sum of n tokens divides is multiplied by n. Keys of grouped queries flow to each query head by themselves.
    """

    eps: float = 1e-6

    paper: ClassVar[str] = "Wu et al. 2022, Flowformer: Linearizing Transformers with Conservation Flows (arXiv:2202.06258)"
    exactness: ClassVar[str] = "another function than softmax, needs training"

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not self.eps >= 0:
            raise PolicyError(f"Flowformer.eps is {self.eps!r}; it must be a number that is not negative.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(), causal=False), Example(cls(), queries=13, causal=False), Example(cls()), Example(cls(0.01))

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*linear.objections(site, "flow attention")]
        if site.facts.causal:
            found += linear.square(site, "causal flow attention")
        elif site.queries == 1 and site.keys != 1:
            found.append(
                f"There is one query of {site.keys} keys, perhaps the last of a sequence; flow attention needs all of them."
            )
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        wide = torch.float64 if site.dtype == torch.float64 else torch.float32
        q, k, v = (torch.ops.aten.to.dtype(x, wide) for x in (query, linear.spread(attend, key), linear.spread(attend, value)))
        q, k = torch.sigmoid(q), torch.sigmoid(k)
        M, N = attend.number(site.queries), attend.number(site.keys)
        if site.facts.causal:
            out = self._causal(q, k, v, attend.arange(M) + 1)
        else:
            into = self._flow(q, torch.sum(k, 2, keepdim=True))
            out_of = self._flow(k, torch.sum(q, 2, keepdim=True))
            kept = self._flow(q, torch.sum(k / out_of[..., None], 2, keepdim=True))
            left = torch.clamp(self._flow(k, torch.sum(q / into[..., None], 2, keepdim=True)), -1.0, 1.0)
            shares = torch.softmax(left, -1)[..., None] * N
            out = linear.linear(q / into[..., None], k, v * shares, False) * torch.sigmoid(kept * (M / N))[..., None]
        return torch.ops.aten.to.dtype(out, site.dtype)  # type: ignore[no-any-return]

    def _flow(self, x: Tensor, total: Tensor) -> Tensor:
        return torch.sum((x + self.eps) * (total + self.eps), -1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        into = self._flow(q, torch.cumsum(k, 2))
        out_of = self._flow(k, torch.cumsum(q, 2))
        kept = self._flow(q, torch.cumsum(k * (n / out_of)[..., None], 2)) / n
        left = torch.exp(torch.clamp(self._flow(k, torch.cumsum(q * (n / into)[..., None], 2)) / n, -1.0, 1.0))
        shares = left / torch.cumsum(left, -1) * n
        return linear.linear(q / into[..., None], k, v * shares[..., None], True) * torch.sigmoid(kept)[..., None]

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return linear.pairs(site, site.head_dim)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, e = q.shape[2], k.shape[2], self.eps
        q, k, v = q.sigmoid(), dense.grouped(k, q).sigmoid(), dense.grouped(v, q)
        seen = dense.seen(M, N, causal, keep, q.device).to(q.dtype)  # keys of a query; of a key, the queries up to it
        back = seen if causal else seen.T
        n = seen.sum(-1) if causal else torch.ones(M, dtype=q.dtype, device=q.device)
        m = back.sum(-1) if causal else torch.ones(N, dtype=q.dtype, device=q.device)
        into = torch.einsum("bhid,bhid->bhi", q + e, seen @ k + e)
        out_of = torch.einsum("bhjd,bhjd->bhj", k + e, back @ q + e)
        kept = torch.einsum("bhid,bhid->bhi", q + e, seen @ (k * (m / out_of)[..., None]) + e) / n
        left = torch.einsum("bhjd,bhjd->bhj", k + e, back @ (q * (n / into)[..., None]) + e) / m
        left = left.clamp(-1, 1).exp()
        shares = left / (seen @ left[..., None])[..., 0] * n if causal else left / left.sum(-1, keepdim=True) * N
        w = torch.einsum("bhid,bhjd->bhij", q / into[..., None], k) * seen
        gate = (kept if causal else kept * M / N).sigmoid()
        return torch.einsum("bhij,bhje->bhie", w, v * shares[..., None]) * gate[..., None]
