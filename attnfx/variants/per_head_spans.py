"""A span of its own for each head, which grows with the length of the sequence: mixture of attention spans."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, head_tables, positions
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class PerHeadSpans(Variant):
    """Head h keeps the first `sinks` keys, and its nearest ones up to a total span of alpha_h + beta_h N of the N keys.

    The span is rounded to the nearest multiple of `block` (halves up), and is at least `sinks` + `block`: the
    window is what the sinks leave of it. `alpha` and `beta`: a number for each query head, or for each key head (and its group);
    or rows of them, one a layer; or the paths of files with such rows, JSON or tab-separated. Of several rows a site has
    that of `layer`, or else of the one number in its module path. Where queries see keys on both sides, the window
    reaches as far on either. N is the number of keys of a call, so the same graph serves every length.
    """

    alpha: head_tables.Table
    beta: head_tables.Table
    sinks: int = 64
    block: int = 64
    layer: int | None = None

    paper: ClassVar[str] = "Fu et al. 2024, MoA: Mixture of Sparse Attention for Automatic LLM Compression (arXiv:2406.14909)"
    exactness: ClassVar[str] = "approximate, needs calibrated spans"

    def __post_init__(self) -> None:
        head_tables.checked("PerHeadSpans.alpha", self.alpha)
        head_tables.checked("PerHeadSpans.beta", self.beta)
        whole_number(self, "sinks", least=0)
        whole_number(self, "block", least=1)
        if self.layer is not None:
            whole_number(self, "layer", least=0)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        alpha, beta = (4, -8, 12, 0), (0.0, 0.5, 0.125, 0.25)
        return (
            Example(cls(alpha, beta, sinks=2, block=4)),
            Example(cls((alpha, beta), (beta, beta), sinks=3, block=4, layer=0), queries=11),
            Example(cls(alpha, beta, sinks=1, block=8), causal=False),
            Example(cls(alpha, beta, sinks=4, block=4), queries=1),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        tables = (head_tables.objections(site, t, self.layer, ("heads", "key_heads")) for t in (self.alpha, self.beta))
        return (*positions.objections(site, "a window"), *(sentence for found in tables for sentence in found))

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        alpha, beta = (self._numbers(t, int(attend.site.heads), attend.site.origin.module) for t in (self.alpha, self.beta))
        spans = torch.add(alpha, torch.mul(beta, attend.number(attend.site.keys)))
        blocks = torch.floor(torch.add(torch.div(spans, self.block), 0.5))
        window = torch.clamp(torch.sub(torch.mul(blocks, self.block), self.sinks), min=self.block)
        site, slot = beside(attend.site, (attend.site.heads,), torch.int64)
        j, width = expr.index("j"), read(slot, expr.index("h"), dtype=torch.int64)
        distance, sink = positions.position(site) - j, expr.le(j, expr.integer(self.sinks - 1))
        near = [distance] if site.facts.delta_low else [distance, -distance]
        own = expr.integer(0)  # no window is empty, which the table does not prove
        keep = expr.logical_and(site.keep, *(expr.logical_or(expr.le(d, own), expr.lt(d, width), sink) for d in near))
        return attend(site.replace(keep=keep), query, key, value, more=[torch.ops.aten._to_copy.default(window, dtype=torch.int64)])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        """The mean over heads; spans are not rounded."""
        alpha, beta = (self._numbers(t, int(site.heads), site.origin.module).tolist() for t in (self.alpha, self.beta))
        total, whole = sympy.Integer(0), super().pairs(site)
        for numbers, heads in Counter(zip(alpha, beta, strict=True)).items():
            a, b = map(sympy.Rational, numbers)
            span = sympy.Max(a + b * site.keys, self.sinks + self.block)
            width = span if positions.ordered(site) else 2 * span - self.sinks
            total += heads * sympy.Min(site.queries * width, whole)
        return total / site.heads

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        position, j = dense.places(M, N, q.device)
        alpha, beta = (self._numbers(t, q.shape[1], "").to(q.device) for t in (self.alpha, self.beta))
        spans = ((alpha + beta * N) / self.block + 0.5).floor() * self.block
        window = (spans - self.sinks).clamp(min=self.block)[:, None, None]
        kept = ((position - j).abs() < window) | (j < self.sinks)
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))

    def _numbers(self, table: head_tables.Table, heads: int, module: str) -> Tensor:
        """A number for each query head, (H,), float64."""
        row = head_tables.rows(table)[head_tables.row_of(table, self.layer, module)]
        if heads % len(row):
            raise PolicyError(f"The row has {len(row)} numbers, and there are {heads} heads.")
        return torch.tensor(row, dtype=torch.float64).repeat_interleave(heads // len(row))
