"""Sliding-window attention, with or without attention sinks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from attnfx import expr
from attnfx.variants.base import Variant, whole_number

if TYPE_CHECKING:
    from attnfx.site import AttentionSite


@dataclass(frozen=True)
class SlidingWindow(Variant):
    """Each query keeps its `window` nearest keys and the first `sinks` keys, of those the model lets it see.

    Query i stands at key p(i): the last key that a causal mask lets it see, or i + N - M where there is no such mask
    (the last query at the last key). Key j is kept iff the model keeps it and |p(i) - j| < window or j < sinks; in a
    causal model that is 0 <= p(i) - j < window or j < sinks. `window` counts the query's own key, as in Mistral:
    window=1 leaves it alone.
    """

    window: int
    sinks: int = 0

    paper: ClassVar[str] = (
        "Beltagy et al. 2020, Longformer (arXiv:2004.05150), windows as in Mistral 7B (arXiv:2310.06825); "
        "sinks: Xiao et al. 2024, StreamingLLM (arXiv:2309.17453)"
    )
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        whole_number(self, "window", least=1)
        whole_number(self, "sinks", least=0)

    def objections(self, site: "AttentionSite") -> tuple[str, ...]:
        diagonals = site.facts.delta_low
        if len(diagonals) > 1:
            return (f"The mask has {len(diagonals)} causal diagonals, and a window needs one to follow.",)
        if diagonals or site.queries == site.keys:
            return ()
        if site.queries != 1:
            return (
                f"The {site.queries} queries and {site.keys} keys have no common positions (no causal mask is proved), "
                "as in cross-attention; a window needs as many queries as keys, or a causal mask.",
            )
        if site.facts.rest:
            return (
                "The mask of the single query is data, so its position among the keys cannot be proved; a window needs "
                "a causal mask, or no mask.",
            )
        return ()

    def apply(self, site: "AttentionSite") -> "AttentionSite":
        i, j = expr.index("i"), expr.index("j")
        diagonals = site.facts.delta_low
        distance = (i - expr.integer(diagonals[0]) if diagonals else i + site.key_length - site.query_length) - j
        near = [expr.le(distance, expr.integer(self.window - 1))]
        if not diagonals:
            near.append(expr.le(-distance, expr.integer(self.window - 1)))
        sink = expr.le(j, expr.integer(self.sinks - 1))
        return site.replace(keep=expr.logical_and(site.keep, *(expr.logical_or(side, sink) for side in near)))

    def reference(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        *,
        causal: bool = False,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        M, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        position = torch.arange(M, device=q.device)[:, None] + (N - M)
        j = torch.arange(N, device=q.device)
        kept = ((position - j).abs() < self.window) | (j < self.sinks)
        if causal:
            kept = kept & (j <= position)
        if keep is not None:
            kept = kept & keep
        scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1)) * scale
        probabilities = scores.masked_fill(~kept, float("-inf")).softmax(-1)  # NaN where a query keeps no key
        return torch.einsum("bhij,bhje->bhie", probabilities, v.repeat_interleave(group, 1))
