"""Attention inside of packed documents whose lengths are given."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, same_id
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant


@dataclass(frozen=True)
class Documents(Variant):
    """Each query keeps the keys of its own document, of those the model lets it see.

    The documents lie one after another in every row of the batch: `lengths` are theirs, and add up to the number of keys; or
    `boundaries`, cumulative: (3, 10, 16) are documents of 3, 7 and 6 tokens, as is (0, 3, 10, 16). Positions are not counted
    anew in each document. Lengths that are the same in every call are supported, and a number of keys that is known. Documents
    that differ from call to call are the model's to tell: a mask built from ids or position ids is read in the graph, and runs
    exactly without any policy.
    """

    lengths: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()

    paper: ClassVar[str] = "Krell et al. 2021, Efficient Sequence Packing without Cross-contamination (arXiv:2107.02027)"
    exactness: ClassVar[str] = "exact for documents that are packed, else another attention"

    def __post_init__(self) -> None:
        ends(self, self.lengths, self.boundaries)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((5, 1, 20, 11))), Example(cls(boundaries=(0, 9, 30, 37)), causal=False), Example(cls((30, 7)), queries=13),
            Example(cls((20, 17)), queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return same_id.objections(site, ends(self, self.lengths, self.boundaries)[-1], "documents")

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, ids = same_id.kept(attend.site, ids_of(ends(self, self.lengths, self.boundaries)))
        return attend(site, query, key, value, more=[ids])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(inside(ends(self, self.lengths, self.boundaries), site), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        kept = blocks(ends(self, self.lengths, self.boundaries), q.shape[2], q.device)
        return dense.attention(q, k, v, scale, kept & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))


def ends(variant: Variant, lengths: tuple[int, ...], boundaries: tuple[int, ...]) -> tuple[int, ...]:
    """Where each document ends, from one of the two; PolicyError where they are neither."""
    name = type(variant).__name__
    if bool(lengths) == bool(boundaries):
        raise PolicyError(f"{name} needs the lengths of the documents or their boundaries, one of the two.")
    given = lengths or boundaries
    if not isinstance(given, tuple) or any(isinstance(x, bool) or not isinstance(x, int) for x in given):
        raise PolicyError(f"{name} has the documents {given!r}; they must be whole numbers.")
    found = tuple(accumulate(lengths)) if lengths else boundaries[boundaries[0] == 0 :]
    if not found or any(a >= b for a, b in pairwise((0, *found))):
        raise PolicyError(f"{name} has the documents {given!r}; each must have at least one token.")
    return found


def ids_of(ends: tuple[int, ...]) -> list[int]:
    """The number of its document for each token."""
    return [n for n, (a, b) in enumerate(pairwise((0, *ends))) for _ in range(a, b)]


def inside(ends: tuple[int, ...], site: AttentionSite) -> sympy.Expr:
    """Pairs of tokens of one document for the mean query, as many times as there are queries."""
    sizes = [b - a for a, b in pairwise((0, *ends))]
    total = sum(n * (n + 1) // 2 if site.facts.causal else n * n for n in sizes)
    return site.queries * sympy.Rational(total, ends[-1])


def blocks(ends: tuple[int, ...], queries: int, device: torch.device) -> Tensor:
    """The dense mask of documents, (M, N): squares on the diagonal, of which the last rows are the queries'."""
    squares = torch.zeros(ends[-1], ends[-1], dtype=torch.bool, device=device)
    for a, b in pairwise((0, *ends)):
        squares[a:b, a:b] = True
    return squares[ends[-1] - queries :]
