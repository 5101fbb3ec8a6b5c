"""How much attention each key receives, from runs of queries: column sums of probabilities that are never formed.

The attention is turned round. Keys ask queries: what a key gives query i is exp(z - LSE of i), its probability, so the log-sum-exp
of the key's row is its column's, and values that say of which run a query is tell the runs apart.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import linear
from attnfx.variants.attend import Attend, beside, read


def of_runs(attend: Attend, query: Tensor, key: Tensor, run: int) -> Tensor:
    """(B, H, N, runs), float32 at least: the sums of probabilities that each run of ``run`` queries gives each key of a causal
    attention with plain scores whose sizes are numbers, and whose last query stands at the last key. Without a gradient. Several
    runs are told apart as precisely as the attention's dtype is."""
    site, (M, width) = attend.site, (int(attend.site.queries), min(16, attend.site.head_dim))
    query, key = torch.detach(query), torch.detach(key)
    lse = attend.with_lse(site.replace(value_dim=width, requires_grad=False), query, key, key[..., :width])[1]
    runs = -(-M // run)
    own = torch.eq(torch.unsqueeze(torch.div(attend.arange(M), run, rounding_mode="floor"), 1), attend.arange(runs))
    values = torch.ops.aten._to_copy.default(own, dtype=site.dtype).expand(attend.number(site.batch), int(site.heads), M, runs)
    shares, total = attend.with_lse(_turned(site, runs), linear.spread(attend, key), query, values, [lse])
    return shares * torch.unsqueeze(torch.exp(total), -1)


def _turned(site: AttentionSite, runs: int) -> AttentionSite:
    """Keys for queries and queries for keys, whose LSE is one more side tensor; the values have ``runs`` columns."""
    dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
    made, slot = beside(site, (site.batch, site.heads, site.queries), dtype)
    b, h, i, j = (expr.index(name) for name in "bhij")
    return made.replace(
        queries=site.keys, keys=site.queries, key_heads=site.heads, value_dim=runs, requires_grad=False,
        score=expr.sub(site.score, read(slot, b, h, j, dtype=dtype)),
        keep=expr.le(i, j + expr.integer(sympy.expand(site.keys - site.queries))),
    )  # fmt: skip
