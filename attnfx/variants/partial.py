"""Attentions over parts of the keys, put together as one: each part is its output and the log-sum-exp of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.site import AttentionSite

#: O (B,H,M,DV) of a part of the keys, and its LSE (B,H,M), -inf where a row has none of them.
Part = tuple[Tensor, Tensor]


def share(part: Part, other: Part, padded: bool = False) -> Tensor:
    """The mass (B,H,M,1) that ``part`` has of both; ``other`` has a key for every row, if not ``padded``: rows without keys then
    have their part of nothing, and a gradient of zero."""
    if not padded:
        return torch.unsqueeze(torch.sigmoid(part[1] - other[1]), -1)
    nothing = float("-inf")
    empty, some = torch.eq(other[1], nothing), torch.gt(part[1], nothing)
    by = torch.sigmoid(part[1] - torch.where(empty, torch.zeros_like(other[1]), other[1]))
    return torch.unsqueeze(torch.where(empty, torch.ops.aten.to.dtype(some, torch.float32), by), -1)


def mixed(part: Part, other: Part, by: Tensor, site: AttentionSite) -> Tensor:
    """``by`` times ``part``, the rest of ``other``: in the dtype of ``site``, and without ``part`` where its share is zero."""
    mine = torch.where(by > 0, part[0], torch.zeros_like(part[0]))
    return torch.ops.aten.to.dtype(other[0] * (1 - by) + mine * by, site.dtype)  # type: ignore[no-any-return]


def merged(part: Part, other: Part, site: AttentionSite, padded: bool = False) -> Tensor:
    """The attention over the keys of both, which have none in common, and ``padded`` of :func:`share`."""
    return mixed(part, other, share(part, other, padded), site)
