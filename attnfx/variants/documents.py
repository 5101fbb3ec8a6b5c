"""Attention inside of packed documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example
from attnfx.variants.packed import Packed


@dataclass(frozen=True)
class Documents(Packed):
    """Each query keeps the keys of its own document, of those the model lets it see.

    The documents lie one after another in every row of the batch: `lengths` are theirs, and add up to the number of keys; or
    `boundaries`, cumulative: (3, 10, 16) are documents of 3, 7 and 6 tokens, as is (0, 3, 10, 16). Positions are not counted
    anew in each document.

    Documents that differ from call to call, and from row to row, are read from an input of the model, by the name that its
    caller gives it: `ids`, "seq_idx" or "document_ids" for instance, holds a number for each token that its document has alone;
    or `positions`, such as "position_ids", tells that a document begins wherever a position is not one more than the one
    before. The model must read that input, since a compiled graph has no other. A model that builds its own mask from ids
    needs no policy: the mask is read in the graph, and runs exactly.
    """

    lengths: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()
    ids: str = ""
    positions: str = ""

    paper: ClassVar[str] = "Krell et al. 2021, Efficient Sequence Packing without Cross-contamination (arXiv:2107.02027)"
    exactness: ClassVar[str] = "exact for documents that are packed, else another attention"

    def __post_init__(self) -> None:
        self.checked()

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((5, 1, 20, 11))), Example(cls(boundaries=(0, 9, 30, 37)), causal=False), Example(cls((30, 7)), queries=13),
            Example(cls((20, 17)), queries=1),
        )  # fmt: skip

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attended(attend, query, key, value)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(self.inside(site), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        kept = self.blocks(q.shape[2], q.device)
        return dense.attention(q, k, v, scale, kept & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))
