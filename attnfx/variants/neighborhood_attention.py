"""Neighbourhood attention of an image, a video or a sequence: dilated, strided and causal by axis."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.variants import boxes, dense
from attnfx.variants.base import Example, whole_number
from attnfx.variants.boxes import Axis, Boxes
from attnfx.variants.over_boxes import OverBoxes

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class NeighborhoodAttention(OverBoxes):
    """Each token of a layout of one to three axes, in the order of rows, sees the `kernel_size` nearest ones along each axis.

    Where a window would pass an end of an axis it is moved inside, so that all windows are of one size; an even window reaches one
    further to the left. With `stride` t runs of t tokens share the window of their middle one, or on a causal axis of their last
    one: from t = `kernel_size` on these are blocks. With `dilation` e only each e-th token is seen, and counts: the classes of
    coordinates modulo e are axes of their own. On axes with `is_causal` a window ends at the token itself, and is cut at the
    beginning. One number stands for the same of all axes. `extra` tokens, before those of the layout or behind them, see all
    and are seen by all.
    """

    layout: Sizes
    kernel_size: int | Sizes
    stride: int | Sizes = 1
    dilation: int | Sizes = 1
    is_causal: bool | tuple[bool, ...] = False
    extra: int = 0
    extra_first: bool = False

    paper: ClassVar[str] = (
        "Hassani et al. 2023, Neighborhood Attention Transformer (arXiv:2204.07143); Hassani and Shi 2022, Dilated Neighborhood "
        "Attention Transformer (arXiv:2209.15001); Hassani et al. 2024, Faster Neighborhood Attention (arXiv:2403.04690); "
        "Hassani et al. 2025, Generalized Neighborhood Attention (arXiv:2504.16922)"
    )
    exactness: ClassVar[str] = "approximate, training-free for some diffusion models"

    def __post_init__(self) -> None:
        boxes.check_layout(self)
        whole_number(self, "extra", least=0)
        for name in ("kernel_size", "stride", "dilation"):
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self._each(name)):
                raise PolicyError(f"NeighborhoodAttention.{name} is {getattr(self, name)!r}; it must be whole numbers from 1 on.")
        if not all(isinstance(c, bool) for c in (*self._each("is_causal"), self.extra_first)):
            raise PolicyError(
                f"NeighborhoodAttention.is_causal is {self.is_causal!r} and extra_first {self.extra_first!r}; "
                "they must be true or false."
            )
        for length, window, stride, dilation, _ in self.axes:
            if window * dilation > length:
                raise PolicyError(
                    f"NeighborhoodAttention.kernel_size is {window} and dilation {dilation} on an axis of {length} tokens; their "
                    "product must not be larger than the axis."
                )
            if stride > window:
                raise PolicyError(f"NeighborhoodAttention.stride is {stride}; it must be at most kernel_size, which is {window}.")

    def _each(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * len(self.layout)
        if len(value) != len(self.layout):
            raise PolicyError(f"NeighborhoodAttention.{name} is {value!r}; it must be one number, or {len(self.layout)} of them.")
        return value

    @property
    def axes(self) -> list[tuple[int, int, int, int, bool]]:
        """(length, kernel_size, stride, dilation, is_causal) of each axis."""
        of_axes = (self._each(name) for name in ("kernel_size", "stride", "dilation", "is_causal"))
        return [(*numbers[:4], bool(numbers[4])) for numbers in zip(self.layout, *of_axes, strict=True)]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((5, 7), 3), 35, 35, causal=False),
            Example(cls((8, 8), (5, 4), stride=(2, 1)), 64, 64, causal=False),
            Example(cls((4, 3, 5), (3, 2, 3), is_causal=(True, False, False), extra=4), 64, 64, causal=False),
            Example(cls((6, 7), (2, 3), dilation=(3, 2), extra=3, extra_first=True), 45, 45, causal=False),
            Example(cls((37,), 7)), Example(cls((6, 6), 3, dilation=2), 36, 36),
        )  # fmt: skip

    def seen(self) -> Boxes:
        return Boxes(tuple(_axis(*numbers) for numbers in self.axes), self.extra, self.extra_first)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        seen = torch.zeros(self.layout + self.layout, dtype=torch.bool)
        for cell in itertools.product(*map(range, self.layout)):
            seen[cell][torch.meshgrid(*map(_nearest, cell, *zip(*self.axes, strict=True)), indexing="ij")] = True
        cells = math.prod(self.layout)
        kept = boxes.with_extra(seen.view(cells, cells), self.extra, self.extra_first).to(q.device)
        return dense.attention(q, k, v, scale, kept & dense.seen(q.shape[2], k.shape[2], causal, keep, q.device))


def _nearest(x: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """The coordinates that coordinate x sees on its axis: by moving a window over those of its class, for the oracle."""
    members = list(range(x % dilation, length, dilation))
    p = members.index(x)
    run = [n for n in range(len(members)) if n // stride == p // stride]
    if causal:
        last = members[: run[0] + stride]
        return torch.tensor([y for y in last[-window:] if y <= x])
    leader = min(run[0] + stride // 2, len(members) - 1)
    windows = [members[n : n + window] for n in range(len(members) - window + 1)]
    # the place of the leader in its window: its middle, or as near to it as the ends allow
    best = min(windows, key=lambda w: abs(w[0] - (members[leader] - window // 2 * dilation)))
    return torch.tensor(best)


def _axis(length: int, window: int, stride: int, dilation: int, causal: bool) -> Axis:
    """The classes of an axis one after another, and what is seen inside of each."""
    apart = boxes.classes(length, dilation)
    low, high = [], []
    for x, (first, last) in enumerate(zip(apart.low, apart.high, strict=True)):
        p, members = x // dilation, last - first + 1
        leader = min(p // stride * stride + (stride - 1 if causal else stride // 2), members - 1)
        if causal:
            begin, end = max(leader - window + 1, 0), p
        else:
            begin = min(max(leader - window // 2, 0), members - window)
            end = begin + window - 1
        low.append(first + begin)
        high.append(first + end)
    return replace(apart, low=tuple(low), high=tuple(high))
