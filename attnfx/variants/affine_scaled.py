"""Softmax weights that are scaled and shifted: a multiple of the output, and of the sum of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant
from attnfx.variants.parameters import real_number


@dataclass(frozen=True)
class AffineScaled(Variant):
    """The weights A become alpha A + beta on the keys that a query sees, so O becomes alpha O + beta (sum of the values it sees).

    The sum is a running one under a causal mask. In the paper alpha and beta are learned functions of the token; here they are
    numbers, the same for every token.
    """

    alpha: float = 1.0
    beta: float = 0.0

    paper: ClassVar[str] = "Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention (arXiv:2602.23057)"
    exactness: ClassVar[str] = "changes the function; alpha and beta are trained"

    def __post_init__(self) -> None:
        real_number(self, "alpha")
        real_number(self, "beta")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(0.75, 0.125)), Example(cls(0.5, -0.25), queries=13), Example(cls(1.5, 0.25), causal=False, queries=29)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        offset = site.facts.causal_offset
        if site.facts.full or (offset is not None and offset == site.keys - site.queries):
            return ()
        return (
            f"The mask is {site.keep}; the sum of the values is known without a mask and under a causal one whose last query "
            "stands at the last key.",
        )

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        exact = value if site.dtype.itemsize > 2 else torch.ops.aten._to_copy.default(value, dtype=torch.float32)
        if site.facts.full:
            sums = torch.sum(exact, 2, keepdim=True)
        else:
            sums = torch.narrow(torch.cumsum(exact, 2), 2, attend.number(site.keys - site.queries), attend.number(site.queries))
        sums = torch.repeat_interleave(sums, int(site.heads) // int(site.key_heads), 1)
        out = torch.add(torch.mul(attend(site, query, key, value), self.alpha), sums, alpha=self.beta)
        return out if site.dtype.itemsize > 2 else torch.ops.aten._to_copy.default(out, dtype=site.dtype)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        kept = dense.seen(q.shape[2], k.shape[2], causal, keep, q.device)
        A = dense.softmax(dense.scores(q, k, scale), kept)
        return dense.mixed((self.alpha * A + self.beta) * kept, v)
