"""Scores with a temperature that depends on the query's position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, positions
from attnfx.variants.base import Example, Variant
from attnfx.variants.parameters import real_number


@dataclass(frozen=True)
class Temperature(Variant):
    """The logits of a query that stands at key p are multiplied by 1 + sigma log(p + 1): the position part of selective
    self-attention, which keeps the weights of late queries from spreading over ever more keys.

    p is the last key that a causal mask lets the query see, or i + N - M without one. All of the logits are multiplied, a bias
    among them. The token part of the paper needs trained weights and is not here.
    """

    sigma: float = 0.0113

    paper: ClassVar[str] = (
        "Zhang et al. 2024, Selective Attention: Enhancing Transformer through Principled Context Control (NeurIPS 2024)"
    )
    exactness: ClassVar[str] = "changes the function; sigma is trained or fine-tuned"

    def __post_init__(self) -> None:
        real_number(self, "sigma", least=0)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(), tolerance=1e-7),
            Example(cls(0.25), queries=13),
            Example(cls(0.5), causal=False),
            Example(cls(0.5), queries=1),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return positions.objections(site, "a temperature of positions")

    def apply(self, site: AttentionSite) -> AttentionSite:
        # a diagonal that begins after the first key leaves early queries without keys, and without a logarithm
        seen = expr.maximum(positions.position(site) + expr.integer(1), expr.integer(1))
        logarithm = expr.call("log", expr.cast(seen, torch.float32))
        return site.replace(score=site.score * (1.0 + self.sigma * logarithm))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        n = torch.arange(N - M + 1, N + 1, dtype=q.dtype, device=q.device)[:, None]
        z = dense.scores(q, k, scale) * (1 + self.sigma * n.log())
        return dense.mixed(dense.softmax(z, dense.seen(M, N, causal, keep, q.device)), v)
