"""Full attention in the retrieval heads, sinks and recent keys in all others: DuoAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, head_tables, positions
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class StreamingHeads(Variant):
    """Each key head, with its group of query heads, attends to everything or to the first `sinks` and nearest `recent` keys.

    `gates`: a number for each key head, 1 for a head that needs all keys; or rows of them, one a layer; or the path of a file
    with such rows (tab-separated, as DuoAttention writes them, or JSON). Of several rows a site has that of `layer`, or else of
    the one number in its module path. A head is full where its gate is above `threshold`. With `sparsity` the threshold does
    not count: that part of all heads of the table, those with the smallest gates, streams; of equal gates, those that come
    first.
    """

    gates: head_tables.Table
    threshold: float = 0.5
    sparsity: float | None = None
    sinks: int = 64
    recent: int = 256
    layer: int | None = None

    paper: ClassVar[str] = "Xiao et al. 2024, DuoAttention: Efficient Long-Context LLM Inference (arXiv:2410.10819)"
    exactness: ClassVar[str] = "approximate, needs calibrated gates"

    def __post_init__(self) -> None:
        head_tables.checked("StreamingHeads.gates", self.gates)
        whole_number(self, "sinks", least=0)
        whole_number(self, "recent", least=1)
        if self.layer is not None:
            whole_number(self, "layer", least=0)
        part: Any = self.sparsity
        if part is not None and (isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part <= 1):
            raise PolicyError(f"StreamingHeads.sparsity is {part!r}; it must be a number from 0 to 1.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((0.9, 0.1, 0.2, 0.8), sinks=2, recent=6), key_heads=4),
            Example(cls(((0.9, 0.1, 0.2, 0.8), (0.4, 0.3, 0.6, 0.5)), sparsity=0.75, layer=1, sinks=1, recent=5), key_heads=4),
            Example(cls((0.0, 1.0, 0.0, 0.0), sinks=3, recent=4), causal=False, key_heads=4),
            Example(cls((0.0, 1.0, 0.0, 1.0), sinks=2, recent=5), queries=1, key_heads=4),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return (*positions.objections(site, "a window"), *head_tables.objections(site, self.gates, self.layer))

    def apply(self, site: AttentionSite) -> AttentionSite:
        full, group = self._full(site.origin.module), int(site.heads / site.key_heads)
        heads = [h for h in range(int(site.heads)) if full[h // group]]
        near = positions.window(site, self.recent, self.sinks)
        return site.replace(keep=expr.logical_and(site.keep, expr.logical_or(head_tables.of_heads(heads), near)))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        full, everything = self._full(site.origin.module), super().pairs(site)
        width = self.recent if positions.ordered(site) else 2 * self.recent - 1
        part = sympy.Rational(sum(full), len(full))
        return part * everything + (1 - part) * sympy.Min(site.queries * (width + self.sinks), everything)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        position, j = dense.places(M, N, q.device)
        full = torch.tensor(self._full(""), device=q.device).repeat_interleave(q.shape[1] // k.shape[1])
        kept = full[:, None, None] | ((position - j).abs() < self.recent) | (j < self.sinks)
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))

    def _full(self, module: str) -> list[bool]:
        """Which key heads of a module attend to everything."""
        table, at = head_tables.rows(self.gates), head_tables.row_of(self.gates, self.layer, module)
        if self.sparsity is None:
            return [gate > self.threshold for gate in table[at]]
        order = sorted((gate, layer, head) for layer, row in enumerate(table) for head, gate in enumerate(row))
        streaming = {(layer, head) for _, layer, head in order[: round(self.sparsity * len(order))]}
        return [(at, head) not in streaming for head in range(len(table[at]))]
