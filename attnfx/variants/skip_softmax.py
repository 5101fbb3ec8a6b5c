"""Tiles of keys whose scores lie far below what a tile of queries has already met are left out, as the softmax goes along."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.sites.skipping import TILES, Skip, left_out
from attnfx.variants import dense
from attnfx.variants.base import Example, Variant
from attnfx.variants.parameters import real_number

#: Up to this many queries are a decode step.
STEP = 16


@dataclass(frozen=True)
class SkipSoftmax(Variant):
    """Of each tile of scores, `rows` queries by `keys` keys in ascending order, softmax, values and second product are left out
    if in every row its largest exponential is less than lambda times the largest that the row has met in the tiles before.

    lambda is `threshold`, or `scale_factor` / N where that is less: the paper finds that what one accuracy wants falls with the
    length, and calibrates the factor once for a model. No key that is left out has more than lambda times the largest probability
    of its row. Nothing is computed beforehand; the first product remains, so that at most about half of the time is saved. Up to 16
    queries are a decode step: the heads that share a key head decide together, and each run of `chunk` keys for itself, as runs are
    worked on side by side. Queries of a tile decide together, so that under a causal mask a later one may keep a tile for an
    earlier one, never a key that it must not see. On a CPU the same tiles are left out, and no time is saved.
    """

    threshold: float = 1e-3
    scale_factor: float | None = None
    rows: int = 64
    keys: int = 64
    chunk: int = 1024

    paper: ClassVar[str] = (
        "Yuan et al. 2025, BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding (arXiv:2512.12087)"
    )
    exactness: ClassVar[str] = "approximate, training-free; no gradient"

    def __post_init__(self) -> None:
        real_number(self, "threshold")
        if not 0.0 < self.threshold < 1.0:
            raise PolicyError(f"SkipSoftmax.threshold is {self.threshold!r}; it must lie between 0 and 1.")
        if self.scale_factor is not None:
            real_number(self, "scale_factor")
            if self.scale_factor <= 0.0:
                raise PolicyError(f"SkipSoftmax.scale_factor is {self.scale_factor!r}; it must be more than 0.")
        for name in ("rows", "keys"):
            size: object = getattr(self, name)
            if isinstance(size, bool) or size not in TILES:
                raise PolicyError(f"SkipSoftmax.{name} is {size!r}; it must be one of {', '.join(map(str, TILES))}.")
        chunk: object = self.chunk
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk <= 0 or chunk % self.keys:
            raise PolicyError(f"SkipSoftmax.chunk is {chunk!r}; it must be a multiple of keys, which is {self.keys}.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(0.9, rows=16, keys=16), queries=50, keys=50, learns=False, foresees=True),
            Example(cls(0.7, rows=16, keys=16, chunk=48), queries=1, keys=150, learns=False),
            Example(cls(0.95, 100.0, rows=16, keys=32), queries=34, keys=200, learns=False, foresees=True),
            Example(cls(0.9, rows=32, keys=16), queries=33, causal=False, learns=False),
            Example(cls(0.9, rows=16, keys=16, chunk=64), queries=2, keys=150, key_heads=4, learns=False, foresees=True),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return ("A gradient is wanted; tiles that are left out have none.",) if site.requires_grad else ()

    def apply(self, site: AttentionSite) -> AttentionSite:
        return site.replace(skip=self._skip(int(site.queries) if site.queries.is_Integer else None))

    def _skip(self, queries: int | None) -> Skip:
        factor = None if self.scale_factor is None else float(self.scale_factor)
        step = queries is not None and queries <= STEP
        return Skip(float(self.threshold), factor, self.rows, self.keys, self.chunk if step else None)

    def share(self, q: Tensor, k: Tensor, scale: float, causal: bool = True) -> float:
        """The share of the visible pairs that is left out for q (B,H,M,D), k (B,HK,N,D): to choose a threshold by.

        In float32, 128 rows at a time: memory is B H 128 N floats, a few times.
        """
        (queries, keys), group = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
        out = visible = 0
        for first in range(0, queries, max(self.rows, 128)):
            part = q[:, :, first : first + max(self.rows, 128)].float()
            z = dense.scores(part, k.float(), scale)
            if causal:
                seen = torch.ones(part.shape[2], keys, dtype=torch.bool, device=q.device).tril(first + keys - queries)
                z = z.masked_fill(~seen, -math.inf)
            some = z > -math.inf
            out += int((left_out(self._skip(queries), z, keys, group) & some).sum())
            visible += int(some.sum())
        return out / max(visible, 1)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        B, H, M, N, G = *q.shape[:3], k.shape[2], k.shape[1]
        z = dense.scores(q, k, scale).masked_fill(~dense.seen(M, N, causal, keep, q.device), -math.inf)
        step = M <= STEP
        if step:
            z = z.reshape(B, G, H // G * M, N)
        limit = math.log(self.threshold if self.scale_factor is None else min(self.threshold, self.scale_factor / N))
        gone = torch.zeros_like(z, dtype=torch.bool)
        for b, h, first in (
            (b, h, i) for b in range(z.shape[0]) for h in range(z.shape[1]) for i in range(0, z.shape[2], self.rows)
        ):
            some = slice(first, first + self.rows)
            met = torch.full_like(z[b, h, some, 0], -math.inf)
            for start in range(0, N, self.keys):
                if step and start % self.chunk == 0:
                    met = torch.full_like(met, -math.inf)
                tile = z[b, h, some, start : start + self.keys]
                top = tile.amax(-1)
                if ((top == -math.inf) | (top < met + limit)).all():
                    gone[b, h, some, start : start + self.keys] = True
                else:
                    met = torch.maximum(met, top)
        return dense.mixed(z.masked_fill(gone, -math.inf).reshape(B, H, M, N).softmax(-1), v)
