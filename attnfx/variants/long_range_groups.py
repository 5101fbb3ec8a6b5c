"""Attention of tokens of many views that stand at like places of a coarser grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.variants import boxes, dense
from attnfx.variants.base import Example, whole_number
from attnfx.variants.boxes import Boxes
from attnfx.variants.over_boxes import OverBoxes


@dataclass(frozen=True)
class LongRangeGroups(OverBoxes):
    """The tokens of `layout` = (views, rows, columns), in this order, see those of all views with the same row modulo `group_num`
    and the same column modulo `group_num`: `group_num` squared groups, each of which covers all views thinly.

    The convolution of the values that the paper's layer adds has weights of its own, and is no part of this.
    """

    layout: tuple[int, ...]
    group_num: int = 7

    paper: ClassVar[str] = "Yang et al. 2023, Long-Range Grouping Transformer for Multi-View 3D Reconstruction (arXiv:2308.08724)"
    exactness: ClassVar[str] = "approximate; models are trained with it"

    def __post_init__(self) -> None:
        boxes.check_layout(self, ranks=(3,))
        whole_number(self, "group_num", least=1)
        if self.group_num > min(self.layout[1:]):
            raise PolicyError(
                f"LongRangeGroups.group_num is {self.group_num}; the grid {self.layout[1:]} has fewer rows or columns."
            )

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((2, 4, 6), 2), 48, 48, causal=False), Example(cls((4, 6, 6), 2), 144, 144, causal=False),
            Example(cls((3, 4, 5), 3), 60, 60, causal=False), Example(cls((2, 4, 4), 2), 32, 32),
        )  # fmt: skip

    def seen(self) -> Boxes:
        views, rows, columns = self.layout
        return Boxes((boxes.parted(views, (0,)), boxes.classes(rows, self.group_num), boxes.classes(columns, self.group_num)))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        """By gathering: a dense attention of each group."""
        number = torch.arange(q.shape[2], device=q.device).view(self.layout)
        seen = dense.seen(q.shape[2], k.shape[2], causal, keep, q.device)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for row in range(self.group_num):
            for column in range(self.group_num):
                at = number[:, row :: self.group_num, column :: self.group_num].flatten()
                kept = seen[..., at, :][..., at]
                out = out.index_copy(2, at, dense.attention(q[:, :, at], k[:, :, at], v[:, :, at], scale, kept))
        return out
