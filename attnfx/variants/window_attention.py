"""Attention inside of the windows that an image or a video is cut into, shifted or not."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.variants import boxes, dense
from attnfx.variants.base import Example
from attnfx.variants.boxes import Boxes
from attnfx.variants.over_boxes import OverBoxes

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class WindowAttention(OverBoxes):
    """Each token of a layout of two or three axes, in the order of rows, sees the tokens of its window of `window_size`.

    With `shift` s windows begin at s, s + window_size, ... on an axis, and what lies before s is a window of its own. That is
    Swin's roll of the image with its mask: the window that is rolled around the edge has its two sides masked from each other.
    Where a window passes the end of an axis it is cut there, and no padding is seen. One number stands for the same of all axes.
    """

    layout: Sizes
    window_size: int | Sizes = 7
    shift: int | Sizes = 0

    paper: ClassVar[str] = "Liu et al. 2021, Swin Transformer (arXiv:2103.14030); in three axes: Video Swin (arXiv:2106.13230)"
    exactness: ClassVar[str] = "approximate; models are trained with it"

    def __post_init__(self) -> None:
        boxes.check_layout(self, ranks=(2, 3))
        for length, window, shift in zip(self.layout, *self.sizes, strict=True):
            if not 1 <= window <= length:
                raise PolicyError(f"WindowAttention.window_size is {window}; it must be from 1 to the axis, {length}.")
            if not 0 <= shift < window:
                raise PolicyError(f"WindowAttention.shift is {shift}; it must be from 0 on and less than window_size, {window}.")

    @property
    def sizes(self) -> tuple[Sizes, Sizes]:
        """`window_size` and `shift` of each axis."""
        return boxes.of_axes(self, "window_size"), boxes.of_axes(self, "shift")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((6, 8), (3, 4)), 48, 48, causal=False), Example(cls((12, 6), 6), 72, 72, causal=False),
            Example(cls((6, 8), 4, shift=2), 48, 48, causal=False),
            Example(cls((5, 4, 3), (2, 3, 2), shift=(1, 0, 1)), 60, 60, causal=False), Example(cls((6, 6), 3, shift=1), 36, 36),
        )  # fmt: skip

    def seen(self) -> Boxes:
        axes = zip(self.layout, *self.sizes, strict=True)
        return Boxes(tuple(boxes.parted(n, tuple(sorted({0, *range(s, n, w)}))) for n, w, s in axes))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        """By Swin's own way: pad, roll, cut into windows, and mask what was rolled from elsewhere."""
        windows, shifts = self.sizes
        padded = [-(-n // w) * w for n, w in zip(self.layout, windows, strict=True)]
        number = torch.full(padded, -1).flatten()
        cells = [sum(x * math.prod(padded[a + 1 :]) for a, x in enumerate(c)) for c in itertools.product(*map(range, self.layout))]
        number[cells] = torch.arange(len(cells))
        region = torch.zeros(padded, dtype=torch.int64)
        for a, (n, w, s) in enumerate(zip(padded, windows, shifts, strict=True)):
            ids = torch.cat([torch.zeros(n - w), torch.ones(w - s), torch.full((s,), 2.0)] if s else [torch.zeros(n)]).long()
            region = 3 * region + ids.view([-1 if b == a else 1 for b in range(len(padded))])
        axes = list(range(len(padded)))
        rolled = number.view(padded).roll([-s for s in shifts], axes)
        kept = torch.zeros(len(cells), len(cells), dtype=torch.bool)
        for corner in itertools.product(*(range(0, n, w) for n, w in zip(padded, windows, strict=True))):
            window = tuple(slice(x, x + w) for x, w in zip(corner, windows, strict=True))
            members, of = rolled[window].flatten(), region[window].flatten()
            for i, r in zip(members.tolist(), of.tolist(), strict=True):
                if i >= 0:
                    kept[i, members[(of == r) & (members >= 0)]] = True
        return dense.attention(q, k, v, scale, kept.to(q.device) & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))
