"""Documents that are packed into one sequence: where each one is, as parameters say it or as the model's caller does."""

from __future__ import annotations

from itertools import accumulate, pairwise

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import base, positions, same_id
from attnfx.variants.attend import Attend
from attnfx.variants.base import Variant


class Packed(Variant):
    """A variant of packed documents, by exactly one of these fields."""

    lengths: tuple[int, ...]
    boundaries: tuple[int, ...]
    ids: str
    positions: str

    def checked(self) -> None:
        """PolicyError unless one field tells of documents."""
        name = type(self).__name__
        if sum(map(bool, (self.lengths, self.boundaries, self.ids, self.positions))) != 1:
            raise PolicyError(
                f"{name} needs the lengths of the documents, their boundaries, or the name of an input with ids or positions, "
                "one of the four."
            )
        for field in ("ids", "positions"):
            if not isinstance(getattr(self, field), str):
                raise PolicyError(f"{name}.{field} is {getattr(self, field)!r}; it must be the name of an input of the model.")
        if not self.named:
            self.ends()

    @property
    def named(self) -> bool:
        """Whether the documents are known only when the model is called."""
        return bool(self.ids or self.positions)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if self.named:
            return positions.objections(site, "a list of tokens")
        return same_id.objections(site, self.ends()[-1], "documents")

    def attended(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, shared: int = 0) -> Tensor:
        """Attention inside of documents, and to the first ``shared`` keys."""
        if not self.named:
            ids = same_id.table([n for n, (a, b) in enumerate(pairwise((0, *self.ends()))) for _ in range(a, b)])
        elif self.ids:
            ids = same_id.named(attend, self.ids)
        else:
            ids = same_id.begun(same_id.named(attend, self.positions))
        return attend(same_id.kept(attend.site, shared=shared, rows=self.named), query, key, value, more=[ids])

    def ends(self) -> tuple[int, ...]:
        """Where each document ends, of lengths or boundaries; PolicyError where they are neither."""
        name, given = type(self).__name__, self.lengths or self.boundaries
        if not isinstance(given, tuple) or any(isinstance(x, bool) or not isinstance(x, int) for x in given):
            raise PolicyError(f"{name} has the documents {given!r}; they must be whole numbers.")
        found = tuple(accumulate(self.lengths)) if self.lengths else given[given[0] == 0 :]
        if not found or any(a >= b for a, b in pairwise((0, *found))):
            raise PolicyError(f"{name} has the documents {given!r}; each must have at least one token.")
        return found

    def inside(self, site: AttentionSite) -> sympy.Expr:
        """Pairs of tokens of one document; all pairs where the documents are known only when the model is called. Of a number of
        queries that is not known those of the mean token."""
        if self.named:
            return base.pairs(site)
        count = self.ends()[-1]
        total, first = 0, count - int(site.queries) if site.queries.is_Integer else 0  # the last tokens are the queries
        for a, b in pairwise((0, *self.ends())):
            rows = range(max(a, first), b)
            total += sum(i + 1 - a for i in rows) if positions.ordered(site) else len(rows) * (b - a)
        return sympy.Integer(total) if site.queries.is_Integer else site.queries * sympy.Rational(total, count)

    def blocks(self, queries: int, device: torch.device) -> Tensor:
        """The dense mask of documents, (M, N): squares on the diagonal, of which the last rows are the queries'."""
        if self.named:
            raise PolicyError(f"The documents of {self} are known only to a model that is called with them.")
        ends = self.ends()
        squares = torch.zeros(ends[-1], ends[-1], dtype=torch.bool, device=device)
        for a, b in pairwise((0, *ends)):
            squares[a:b, a:b] = True
        return squares[ends[-1] - queries :]
