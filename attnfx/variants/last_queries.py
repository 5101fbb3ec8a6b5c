"""What a few queries in a row, seen as they attend, say about keys and about distances."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx.variants.attend import Attend


def weights(attend: Attend, query: Tensor, key: Tensor, last: int, most: int, kept: Tensor | None = None) -> Tensor:
    """Probabilities (B, H, rows, keys) of up to ``most`` queries up to and with ``last``, over the keys up to its own: without a
    gradient, and float32 at least. For a plain causal attention of sizes that are numbers, in which a mask may hide all keys but
    those ``kept`` (B or 1, 1, 1, N); a query without keys gives nothing."""
    site, group = attend.site, int(attend.site.heads) // int(attend.site.key_heads)
    seen, rows = last + 1 + int(site.keys - site.queries), min(most, last + 1)
    dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
    chosen = torch.unflatten(query[:, :, last + 1 - rows : last + 1], 1, (int(site.key_heads), group))
    q, k = (torch.ops.aten._to_copy.default(torch.detach(x), dtype=dtype) for x in (chosen, key[:, :, :seen]))
    z = torch.matmul(torch.flatten(q, 2, 3), torch.transpose(k, 2, 3)) * (site.scale or 1.0)
    z = torch.flatten(torch.unflatten(z, 2, (group, rows)), 1, 2)
    ahead = torch.gt(attend.arange(seen), torch.unsqueeze(torch.add(attend.arange(rows), seen - rows), 1))
    if kept is None:
        return torch.softmax(torch.masked_fill(z, ahead, float("-inf")), -1)
    hidden = torch.logical_or(ahead, torch.logical_not(kept[..., :seen]))
    return torch.nan_to_num(torch.softmax(torch.masked_fill(z, hidden, float("-inf")), -1), 0.0)


def by_distance(weights: Tensor, rows: int, keys: int) -> Tensor:
    """Sums (B, H, keys) of weights (B, H, rows, keys) by the distance of key and query; the last query stands at the last key."""
    width = keys + rows - 1
    skewed = torch.flatten(pad(weights, (rows - 1, 0)), 2, 3)  # read with longer rows, diagonals are columns
    sums = torch.sum(torch.unflatten(pad(skewed, (0, rows)), 2, (rows, width + 1)), 2)
    return torch.flip(sums[..., :keys], (2,))
