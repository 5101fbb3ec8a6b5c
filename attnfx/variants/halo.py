"""HaloNet's attention of blocks with a halo."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.variants import boxes, dense
from attnfx.variants.base import Example, whole_number
from attnfx.variants.boxes import Boxes
from attnfx.variants.over_boxes import OverBoxes


@dataclass(frozen=True)
class Halo(OverBoxes):
    """The tokens of a layout, in the order of rows, are cut into blocks of `block_size` along each axis. Those of a block see the
    block and the `halo_size` tokens around it, of the layout: what a halo has beyond the edge is masked, not zeros that are seen.
    """

    layout: tuple[int, ...]
    block_size: int = 8
    halo_size: int = 3

    paper: ClassVar[str] = "Vaswani et al. 2021, Scaling Local Self-Attention for Visual Backbones, HaloNet (arXiv:2103.12731)"
    exactness: ClassVar[str] = "approximate; models are trained with it"

    def __post_init__(self) -> None:
        boxes.check_layout(self)
        whole_number(self, "block_size", least=1)
        whole_number(self, "halo_size", least=0)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((6, 8), 2, 1), 48, 48, causal=False), Example(cls((5, 9), 4, 3), 45, 45, causal=False),
            Example(cls((3, 4, 5), 2, 1), 60, 60, causal=False), Example(cls((5, 7), 3, 1), 35, 35),
        )  # fmt: skip

    def seen(self) -> Boxes:
        parts = (boxes.parted(n, tuple(range(0, n, self.block_size)), self.halo_size) for n in self.layout)
        return Boxes(tuple(parts))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        """By gathering: a dense attention of each block over the tokens of its halo."""
        b, h = self.block_size, self.halo_size
        number = torch.arange(q.shape[2], device=q.device).view(self.layout)
        seen = dense.seen(q.shape[2], k.shape[2], causal, keep, q.device)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for corner in itertools.product(*(range(0, n, b) for n in self.layout)):
            rows = number[tuple(slice(x, x + b) for x in corner)].flatten()
            columns = number[tuple(slice(max(x - h, 0), x + b + h) for x in corner)].flatten()
            kept = seen[..., rows, :][..., columns]
            out = out.index_copy(2, rows, dense.attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], scale, kept))
        return out
