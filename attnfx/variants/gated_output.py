"""The output of an attention, each head multiplied by a sigmoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant
from attnfx.variants.parameters import real_numbers


@dataclass(frozen=True)
class GatedOutput(Variant):
    """O becomes O sigmoid(g), with `gates`: one number g for each query head.

    The paper's gate is a projection of the layer's input, which an attention does not have, and is trained with the model (a
    model that has one already keeps it, beside the attention). These gates are numbers: to switch heads off (-inf is not
    needed: -100 is zero) or to weigh them.
    """

    gates: tuple[float, ...]

    paper: ClassVar[str] = "Qiu et al. 2025, Gated Attention for Large Language Models (arXiv:2505.06708)"
    exactness: ClassVar[str] = "changes the function"

    def __post_init__(self) -> None:
        real_numbers(self, "gates")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls((0.5, -2.0, 30.0, -30.0))), Example(cls((0.0, 1.0, 2.0, -1.0)), causal=False, queries=13)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if site.heads == len(self.gates):
            return ()
        return (f"There are {len(self.gates)} gates, and the attention has {site.heads} heads.",)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gates = torch.tensor(self.gates, dtype=torch.float64).sigmoid().to(attend.site.dtype)[:, None, None]
        return torch.mul(attend(attend.site, query, key, value), gates)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        out = dense.attention(q, k, v, scale, dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))
        return out * torch.tensor(self.gates, dtype=q.dtype, device=q.device).sigmoid()[:, None, None]
