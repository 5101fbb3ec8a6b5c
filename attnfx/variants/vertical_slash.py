"""Columns and diagonals of the attention matrix that a few queries find heavy: the vertical-slash heads of MInference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import INDEX, Expr, Int
from attnfx.site import AttentionSite
from attnfx.variants import dense, key_masks, last_queries, linear, partial, selection, summaries
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.base import Example, Variant, whole_number

J = INDEX["j"]


@dataclass(frozen=True)
class VerticalSlash(Variant):
    """A query keeps the `vertical_size` keys, and the keys at the `slash_size` distances, that `last_q` queries before it gave most
    of their attention.

    Their probabilities are summed by key and by distance; keys that the model's padding hides have none. The first `sinks` keys
    and the `local` smallest distances are always among those chosen. Distances are chosen in bands of `block` neighbours, and a
    band keeps each block of `block` x `block` pairs that it crosses: what a kernel computes anyway. Keys are gathered one by one.

    `segment` queries share a choice, made by the last queries up to and with their first, so that nothing is known of the future,
    and a longer prompt changes nothing of its beginning. The first segment attends to all that it may: so do a decode step and a
    prompt of one segment. `segment=0` is the paper's prefill: the last queries of the prompt choose for all of it, and those
    before them know the future by the choice. Blocks of 128 are whole tiles of a kernel, and those below 8 leave no tile out. The
    table of blocks has (queries / `block`) x (keys / `block`) bytes for each head, and the probabilities that a choice looks at are
    `last_q` x keys numbers.
    """

    vertical_size: int = 1000
    slash_size: int = 6096
    last_q: int = 64
    segment: int = 16384
    sinks: int = 30
    local: int = 100
    block: int = 128

    paper: ClassVar[str] = "Jiang et al. 2024, MInference 1.0 (arXiv:2407.02490), vertical-slash heads"
    exactness: ClassVar[str] = "approximate, training-free; with segment=0 the future takes part in its choices"

    def __post_init__(self) -> None:
        for name in ("vertical_size", "slash_size", "last_q", "local", "block"):
            whole_number(self, name, least=1)
        whole_number(self, "segment", least=0)
        whole_number(self, "sinks", least=0)
        if self.sinks > self.vertical_size:
            raise PolicyError(f"VerticalSlash.sinks is {self.sinks}; it must be at most vertical_size, {self.vertical_size}.")
        if self.segment % self.block or 0 < self.segment < self.last_q:
            raise PolicyError(
                f"VerticalSlash.segment is {self.segment}; it must be 0 or a multiple of block, {self.block}, and not less than "
                f"last_q, {self.last_q}."
            )

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        small = cls(3, 8, last_q=5, segment=12, sinks=1, local=3, block=4)
        return (
            Example(small), Example(cls(4, 3, 4, 6, 0, 1, 3), queries=20, keys=33, key_heads=4),
            Example(cls(2, 4, 3, 0, 1, 2, 2), foresees=True), Example(cls(2, 6, 4, 8, 2, 4, 4), queries=21, keys=24),
            Example(small, queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if site.queries == 1:  # which attends to all that it may
            return ()
        found = summaries.known(site, "VerticalSlash")
        found += linear.objections(site, "a choice of columns and diagonals", causal=True, padded=True)
        if any(isinstance(n, Int) and n.value.has(J) and n.value != J for n in expr.walk(expr.logical_and(*site.facts.rest))):
            found += (f"The mask is {site.keep}, which tells of other keys than those it hides.",)
        return found

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        starts = self._starts(int(site.queries))
        if not starts:
            return attend(site, query, key, value)
        columns, bands = self._chosen(attend, query, key, starts)
        kept = self._crossed(site, bands)  # (B, H, segments, distances of blocks)
        own = selection.masked(site, self._size).replace(empty_rows="zero")  # there is none, as each query keeps its own key
        near = attend.with_lse(own, query, key, value, [self._table(attend, kept)])
        heads, group = int(site.key_heads), int(site.heads) // int(site.key_heads)
        at = torch.unsqueeze(torch.flatten(torch.unflatten(columns, 1, (heads, group)), 2, 3), -1)
        keys, values = (
            torch.flatten(torch.unflatten(torch.gather(x, 2, at.expand(-1, -1, -1, width)), 2, (group, -1)), 1, 2)
            for x, width in ((key, site.head_dim), (value, site.value_dim))
        )
        far = attend.with_lse(self._far(site, len(starts)), query, keys, values, [columns, kept])
        return partial.merged(far, near, site, padded=bool(site.facts.rest))

    @property
    def _size(self) -> tuple[int, int]:
        return self.block, self.block

    def _starts(self, queries: int) -> list[int]:
        """The last query of each run that chooses: the first of each segment but the first, or the last of all."""
        if self.segment:
            return list(range(self.segment, queries, self.segment))
        return [queries - 1] if queries > self.last_q else []

    def _width(self, site: AttentionSite) -> int:
        """How many keys each choice gathers: the first one may know fewer."""
        return min(self.vertical_size, self._starts(int(site.queries))[0] + 1 + int(site.keys - site.queries))

    def _sums(self, attend: Attend, query: Tensor, key: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """What the queries up to and with ``last`` give keys (B, H, N), -1 those they do not see, and bands (B, H, bands)."""
        site, seen = attend.site, last + 1 + int(attend.site.keys - attend.site.queries)
        shown = key_masks.kept(attend, expr.logical_and(*site.facts.rest)) if site.facts.rest else None
        weights = last_queries.weights(attend, query, key, last, self.last_q, shown)
        columns = pad(torch.sum(weights, 2), (0, int(site.keys) - seen), value=-1.0)
        bands = selection.blocks(site.keys, self.block)
        distances = last_queries.by_distance(weights, min(self.last_q, last + 1), seen)
        padded = pad(distances, (0, bands * self.block - seen))
        return columns, torch.sum(torch.unflatten(padded, 2, (bands, self.block)), 3)

    def _chosen(self, attend: Attend, query: Tensor, key: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
        """The keys that each choice gathers, in order (B, H, S * width), and which bands it keeps (B, H, S, bands)."""
        sums = [self._sums(attend, query, key, last) for last in starts]
        columns, mass = (torch.stack(each, 2) for each in zip(*sums, strict=True))
        sinks = torch.logical_and(torch.lt(attend.arange(int(attend.site.keys)), self.sinks), torch.ge(columns, 0))
        keys = torch.topk(torch.masked_fill(columns, sinks, float("inf")), self._width(attend.site))[1]
        number = selection.blocks(attend.site.keys, self.block)
        local = torch.lt(attend.arange(number), -(-self.local // self.block))
        best = torch.topk(torch.masked_fill(mass, local, float("inf")), min(-(-self.slash_size // self.block), number))[1]
        picked = torch.scatter(torch.zeros_like(mass, dtype=torch.bool), 3, best, True)
        kept = torch.logical_or(torch.logical_and(picked, torch.gt(mass, 0)), local)
        return torch.flatten(torch.sort(keys)[0], 2, 3), kept

    def _crossed(self, site: AttentionSite, bands: Tensor) -> Tensor:
        """Of blocks of pairs, by their distance in blocks, from -1 on, whether a band of (B, H, S, bands) crosses them."""
        count = selection.blocks(site.keys, self.block)
        off = int(site.keys - site.queries) % self.block  # of the queries' blocks from those of the keys
        padded = pad(bands, (2, 1))
        least, most = int(off == self.block - 1) - 1, int(off > 0)
        kept = padded[..., 1 + least : 2 + least + count]
        for shift in range(least + 1, most + 1):
            kept = torch.logical_or(kept, padded[..., 1 + shift : 2 + shift + count])
        if not self.segment:
            return kept
        return torch.cat([torch.ones_like(kept[:, :, :1]), kept], 2)

    def _table(self, attend: Attend, kept: Tensor) -> Tensor:
        """The table of blocks (B, H, I, J) from :meth:`_crossed`."""
        site = attend.site
        rows, columns = (selection.blocks(n, self.block) for n in (site.queries, site.keys))
        row = torch.unsqueeze(attend.arange(rows), 1)
        at = torch.clamp(torch.sub(torch.add(row, int(site.keys - site.queries) // self.block + 1), attend.arange(columns)), min=0)
        if self.segment:
            segment = torch.div(torch.mul(row, self.block), self.segment, rounding_mode="floor")
            at = torch.add(at, torch.mul(segment, columns + 1))
        table = torch.index_select(torch.flatten(kept, 2, 3), 2, torch.flatten(at))
        return torch.unflatten(table, 2, (rows, columns))

    def _far(self, site: AttentionSite, choices: int) -> AttentionSite:
        """Gathered keys, of which a query sees its own choice's where no band kept them already."""
        width, ahead = self._width(site), int(site.keys - site.queries)
        distances = selection.blocks(site.keys, self.block) + 1
        made, where = beside(site, (site.batch, site.heads, choices * width), torch.int64)
        segments = choices + 1 if self.segment else 1
        made, bands = beside(made, (site.batch, site.heads, segments, distances), torch.bool)
        b, h, i, j = (expr.index(name) for name in "bhij")
        at = read(where, b, h, j, dtype=torch.int64)
        segment: Expr = expr.integer(0)
        keep = [expr.le(at, i + expr.integer(ahead))]
        keep += [expr.rebuild(term, lambda node: at if node == j else None) for term in site.facts.rest]
        if self.segment:
            segment = expr.floordiv(i, expr.integer(self.segment))
            keep.append(expr.eq(segment, expr.floordiv(j, expr.integer(width)) + expr.integer(1)))
        row, column = (expr.floordiv(x, expr.integer(self.block)) for x in (i, at))
        crossed = read(bands, b, h, segment, row - column + expr.integer(ahead // self.block + 1), dtype=torch.bool)
        keep.append(expr.logical_not(crossed))
        return made.replace(
            keys=sympy.Integer(choices * width), key_heads=site.heads, keep=expr.logical_and(*keep), empty_rows="zero"
        )

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        M, N = site.queries, site.keys
        bands = max(-(-self.slash_size // self.block), -(-self.local // self.block))
        exact = sympy.Min(self.segment, M)
        whole = exact * (N - M) + exact * (exact + 1) / 2
        choosing = self.last_q * (M * M / self.segment if self.segment else 2 * N) / 4  # without values
        chosen = (M - exact) * (self.vertical_size + 2 * bands * self.block)
        return sympy.Min(whole + choosing + chosen, super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, size = q.shape[2], k.shape[2], self.block
        ahead, weights = (
            N - M,
            dense.softmax(dense.scores(q, k, scale), dense.seen(M, N, True, keep, q.device)).detach().nan_to_num(),
        )
        kept = torch.ones(*q.shape[:2], M, N, dtype=torch.bool, device=q.device)
        spans = [(s, range(s, min(s + self.segment, M))) for s in range(self.segment, M, self.segment)] if self.segment else []
        if not self.segment and self.last_q < M:
            spans = [(M - 1, range(M))]
        for last, rows in spans:
            by = weights[:, :, max(0, last + 1 - self.last_q) : last + 1]
            column = by.sum(2)[..., : last + 1 + ahead]
            column[..., : self.sinks] = float("inf")
            count = min(self.vertical_size, spans[0][0] + 1 + ahead)
            heavy = torch.zeros(*q.shape[:2], N, dtype=torch.bool).scatter(
                2, column.argsort(-1, descending=True)[..., :count], True
            )
            mass = torch.zeros(*q.shape[:2], -(-N // size) * size, dtype=q.dtype)
            for t, at in enumerate(range(last + 1 + ahead - by.shape[2], last + 1 + ahead)):
                mass[..., : at + 1] += by[:, :, t, : at + 1].flip(-1)
            bands = torch.unflatten(mass, 2, (-1, size)).sum(3)
            local = torch.arange(bands.shape[-1]) * size < self.local
            order = bands.masked_fill(local, float("inf")).argsort(-1, descending=True)[..., : -(-self.slash_size // size)]
            slash = torch.zeros_like(bands, dtype=torch.bool).scatter(2, order, True) & (bands > 0) | local
            for I in {i // size for i in rows}:
                for J in range(-(-N // size)):
                    apart = size * (I - J) + ahead
                    crossed = {d // size for d in range(apart - size + 1, apart + size) if 0 <= d < mass.shape[-1]}
                    each = slice(max(I * size, rows[0]), min((I + 1) * size, rows[-1] + 1)), slice(J * size, (J + 1) * size)
                    kept[:, :, *each] = (heavy[..., each[1]] | slash[..., sorted(crossed)].any(-1, True))[:, :, None]
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))
