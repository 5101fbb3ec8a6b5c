"""Lightning attention: linear attention with a fixed decay for each head, and nothing that divides."""

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
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class Lightning(Variant):
    """O_i = sum_{j <= i} exp(-r m_h (i - j)) (q_i . k_j) v_j, with ALiBi's slopes m_h = 2^(-8 (h + 1) / H) of heads h from 0 on.

    r = 1 - layer / (layers - 1) + 1e-5, as TransNormer has it: the last layer hardly decays. One layer alone has r = 1. No scale;
    the norm and the gate behind it are the model's own business.
    """

    layer: int = 0
    layers: int = 1

    paper: ClassVar[str] = (
        "Qin et al. 2024, Lightning Attention-2 (arXiv:2401.04658, arXiv:2405.17381); slopes: TransNormerLLM (arXiv:2307.14995)"
    )
    exactness: ClassVar[str] = "another function than softmax, needs training"

    def __post_init__(self) -> None:
        whole_number(self, "layer", least=0)
        whole_number(self, "layers", least=1)
        if self.layer >= self.layers:
            raise PolicyError(f"Lightning.layer is {self.layer}; it must be below Lightning.layers, {self.layers}.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls()), Example(cls(3, 4)), Example(cls(1, 4), queries=11, key_heads=4)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*linear.objections(site, "lightning attention", causal=True, padded=True)]
        if not site.heads.is_Integer:
            found.append(f"The number of heads is {site.heads}; the slopes need a known one.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        decay = torch.tensor(self._decay(int(attend.site.heads)), dtype=torch.float64, device=attend.device)
        return linear.attended(attend, query, key, value, decay)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return linear.pairs(site, site.head_dim)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        behind = torch.arange(M, device=q.device)[:, None] + (N - M) - torch.arange(N, device=q.device)
        log = torch.tensor(self._decay(q.shape[1]), dtype=q.dtype, device=q.device)[:, None, None]
        w = dense.scores(q, k, 1.0) * torch.exp(log * behind.clamp(min=0))
        return linear.mixed(w, v, dense.seen(M, N, causal, keep, q.device), normalize=False)

    def _decay(self, heads: int) -> list[float]:
        rate = 1.0 if self.layers == 1 else 1.0 - self.layer / (self.layers - 1) + 1e-5
        return [-rate * 2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
