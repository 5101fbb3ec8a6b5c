"""Packed documents that share the first token: AnchorAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, whole_number
from attnfx.variants.packed import Packed


@dataclass(frozen=True)
class Anchor(Packed):
    """Each query keeps the keys of its own document, and the first `anchors` tokens of the sequence, which all documents share.

    `lengths`, `boundaries`, `ids` and `positions` are those of :class:`Documents`: the anchor belongs to the first of them.
    Positions are not counted anew in each document: with the anchor as its only shared token, the position that bfloat16 rounds
    worst is always the same. In the paper the attention is causal; here the model's own mask decides.
    """

    lengths: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()
    anchors: int = 1
    ids: str = ""
    positions: str = ""

    paper: ClassVar[str] = "Wang et al. 2024, When Precision Meets Position: BFloat16 Breaks Down RoPE (arXiv:2411.13476)"
    exactness: ClassVar[str] = "approximate, for training on packed documents"

    def __post_init__(self) -> None:
        self.checked()
        whole_number(self, "anchors", least=1)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((6, 20, 11))), Example(cls(boundaries=(2, 9, 30, 37), anchors=3)), Example(cls((16, 21)), causal=False),
            Example(cls((30, 7)), queries=13), Example(cls((20, 17)), queries=1),
        )  # fmt: skip

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attended(attend, query, key, value, shared=self.anchors)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(self.inside(site) + self.anchors * site.queries, super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        kept = self.blocks(q.shape[2], q.device)
        kept[:, : self.anchors] = True
        return dense.attention(q, k, v, scale, kept & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))
