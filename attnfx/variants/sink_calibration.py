"""Attention calibration: keys on which too much attention rests give some of it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import column_sums, dense, linear, partial, selection, summaries
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.base import Example, Variant, whole_number

#: As many runs of queries choose, which are columns of values in a kernel.
MOST = 128
#: Keys that tell together whether there is a sink among them.
BLOCK = 64


@dataclass(frozen=True)
class SinkCalibration(Variant):
    """A key, but the first, to which the queries that see it give more than `threshold` on average, is a sink. Its probabilities
    are multiplied by `beta`, and the others of the row take up what they lose, in proportion.

    In the `heads` named, which the paper finds offline for each layer, or in all. Each `segment` of queries has its own sinks, by
    the queries before it, so that nothing is known of the future; the first segment is left as it is. `segment=0` is the paper's:
    all queries count for all, so that earlier ones know the future by the choice. Queries of earlier calls, behind a cache, are
    not counted. The column sums take one pass over queries and keys, their normalisers another, and no matrix of both is formed.
    """

    beta: float = 0.4
    threshold: float = 0.1
    segment: int = 256
    heads: tuple[int, ...] = ()

    paper: ClassVar[str] = (
        "Yu et al. 2024, Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration (arXiv:2406.15765), ACT"
    )
    exactness: ClassVar[str] = "changes the function, training-free; with segment=0 the future takes part in its choices"

    def __post_init__(self) -> None:
        for name in ("beta", "threshold"):
            given: object = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
                raise PolicyError(f"SinkCalibration.{name} is {given!r}; it must be a number from 0 to 1.")
        whole_number(self, "segment", least=0)
        if any(isinstance(h, bool) or not isinstance(h, int) or h < 0 for h in self.heads):
            raise PolicyError(f"SinkCalibration.heads is {self.heads!r}; it must be numbers of heads.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(threshold=0.09, segment=10)), Example(cls(0.25, 0.05, 0, (0, 3)), foresees=True),
            Example(cls(0.5, 0.06, 7, (1, 2)), queries=20, keys=33, key_heads=4), Example(cls(threshold=0.01), queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*summaries.known(site, "SinkCalibration"), *linear.objections(site, "calibration of sinks", causal=True)]
        if any(h >= site.heads for h in self.heads):
            found.append(f"The heads are {self.heads}; the site has {site.heads}.")
        if not found and self.segment and -(-int(site.queries) // self.segment) > MOST:
            found.append(f"There are {site.queries} queries in segments of {self.segment}; there may be {MOST} segments.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        if self.segment and site.queries <= self.segment:
            return attend(site, query, key, value)
        sinks = self._sinks(attend, query, key)  # (B, H, segments, N)
        blocks = selection.blocks(site.keys, BLOCK)
        some = torch.any(torch.unflatten(pad(sinks, (0, blocks * BLOCK - int(site.keys))), 3, (blocks, BLOCK)), 4)
        of_sinks = attend.with_lse(self._part(site, True), query, key, value, [sinks, some])
        others = attend.with_lse(self._part(site, False), query, key, value, [sinks, some])
        return partial.mixed(of_sinks, others, partial.share(of_sinks, others) * self.beta, site)

    def _sinks(self, attend: Attend, query: Tensor, key: Tensor) -> Tensor:
        site, (M, N) = attend.site, (int(attend.site.queries), int(attend.site.keys))
        masses = torch.transpose(column_sums.of_runs(attend, query, key, self.segment or M), 2, 3)
        ends = torch.mul(torch.add(attend.arange(-(-M // (self.segment or M))), 1), self.segment or M)
        if self.segment:  # what came before each segment
            masses, ends = pad(torch.cumsum(masses, 2)[:, :, :-1], (0, 0, 1, 0)), torch.sub(ends, self.segment)
        key_at = attend.arange(N)
        seen = torch.sub(torch.unsqueeze(torch.clamp(ends, max=M), 1), torch.clamp(torch.sub(key_at, N - M), min=0))
        heavy = torch.gt(masses, torch.mul(torch.clamp(seen, min=0), self.threshold))
        chosen = torch.tensor([not self.heads or h in self.heads for h in range(int(site.heads))])[:, None, None]
        return torch.logical_and(torch.logical_and(heavy, torch.gt(key_at, 0)), chosen)

    def _part(self, site: AttentionSite, of_sinks: bool) -> AttentionSite:
        """The attention to sinks, or to the others; whole tiles are decided by blocks of keys that have one."""
        count = -(-int(site.queries) // self.segment) if self.segment else 1
        made, each = beside(site, (site.batch, site.heads, count, site.keys), torch.bool)
        made, block = beside(made, (site.batch, site.heads, count, selection.blocks(site.keys, BLOCK)), torch.bool)
        b, h, i, j = (expr.index(name) for name in "bhij")
        segment: Expr = expr.floordiv(i, expr.integer(self.segment)) if self.segment else expr.integer(0)
        sink = expr.logical_and(
            read(block, b, h, segment, expr.floordiv(j, expr.integer(BLOCK)), dtype=torch.bool),
            read(each, b, h, segment, j, dtype=torch.bool),
        )
        keep = expr.logical_and(site.keep, sink if of_sinks else expr.logical_not(sink))
        return made.replace(keep=keep, empty_rows="zero")  # the first key is always among the others

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return super().pairs(site) * 3

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        seen = dense.seen(M, N, causal, keep, q.device)
        A = dense.softmax(dense.scores(q, k, scale), seen)
        heads = torch.tensor([not self.heads or h in self.heads for h in range(q.shape[1])])[:, None]
        changed = []
        for first in range(0, M, self.segment or M):
            rows, until = slice(first, first + (self.segment or M)), first if self.segment else M
            visible = dense.seen(M, N, True, None, q.device)[:until].sum(0).clamp(min=1)
            sinks = (A[:, :, :until].detach().sum(2) / visible > self.threshold) & heads & (torch.arange(N) > 0)
            mine = A[:, :, rows]
            mass = (mine * sinks[:, :, None]).sum(-1, keepdim=True)
            more = 1 + (1 - self.beta) * mass / (1 - mass)
            changed.append(torch.where(sinks[:, :, None], mine * self.beta, mine * more))
        return dense.mixed(torch.cat(changed, 2), v)
