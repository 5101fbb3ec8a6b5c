"""Tiles of scores that an attention leaves out because they lie far below what their rows have met: which, as a predicate.

BLASST (Yuan et al. 2025, arXiv:2512.12087): a tile counts only if in some of its rows the largest score is at least lambda times,
as exponentials, the largest of the tiles before it. What is left out has a smaller maximum than the row's, so the running maximum
does not hang on what was left out before, and all tiles are decided at once here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

#: How many queries, and keys, a tile may have.
TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Skip:
    """lambda = min(``threshold``, ``scale_factor`` / N), of tiles of ``rows`` queries of one head and ``keys`` keys, which ascend.

    With a ``chunk``, for a decode step: the rows of a tile are the queries of all heads that share a key head, head by head, and
    each run of ``chunk`` keys begins without a maximum, so that runs are worked on apart.
    """

    threshold: float
    scale_factor: float | None
    rows: int
    keys: int
    chunk: int | None = None

    def __str__(self) -> str:
        return f"{self.threshold:g}" if self.scale_factor is None else f"min({self.threshold:g}, {self.scale_factor:g}/N)"

    def limit(self, keys: int) -> float:
        """ln(lambda), of N keys."""
        if self.scale_factor is None:
            return math.log(self.threshold)
        return math.log(min(self.threshold, self.scale_factor / max(keys, 1)))


def left_out(skip: Skip, z: Tensor, keys: int, group: int, first: int = 0) -> Tensor:
    """Which of the scores z (B,H,R,C), natural logits with -inf where the mask keeps nothing, are in tiles that are left out.

    R are rows from the start of a tile on, with a chunk all queries; C are neighbouring keys from ``first`` on, of ``keys`` in all;
    ``group`` query heads share a key head.
    """
    batch, heads, rows, columns = z.shape
    if skip.chunk is not None:
        z = z.reshape(batch, heads // group, group * rows, columns)
    before = first % (skip.chunk or skip.keys)
    whole = pad(z, (before, -(before + columns) % skip.keys, 0, -z.shape[2] % skip.rows), value=-math.inf)
    tops = torch.unflatten(whole, 3, (-1, skip.keys)).amax(4)  # (B, H, rows, tiles)
    small = (tops == -math.inf) | (tops < _met(skip, tops) + skip.limit(keys))
    together = torch.unflatten(small, 2, (-1, skip.rows)).all(3)
    spread = together.repeat_interleave(skip.rows, 2).repeat_interleave(skip.keys, 3)
    return spread[:, :, : z.shape[2], before : before + columns].reshape(batch, heads, rows, columns)


def _met(skip: Skip, tops: Tensor) -> Tensor:
    """The largest score of the tiles before each, of its chunk where there are chunks."""
    tiles, run = tops.shape[3], tops.shape[3] if skip.chunk is None else skip.chunk // skip.keys
    runs = torch.unflatten(pad(tops, (0, -tiles % run), value=-math.inf), 3, (-1, run))
    return torch.flatten(pad(torch.cummax(runs, -1).values[..., :-1], (1, 0), value=-math.inf), 3)[..., :tiles]
