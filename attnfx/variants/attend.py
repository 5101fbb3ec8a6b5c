"""What a composed variant is written with: the attention that it replaces, and ways to call attentions of its own.

The same composition runs on tensors, and on the proxies of a graph into which it is written. So it is made of torch functions
(no methods that ask for values, no branches on sizes), and asks :class:`Attend` for sizes and positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
import torch

from attnfx.expr import Expr, Load
from attnfx.site import AttentionSite, SideTensor

if TYPE_CHECKING:
    from torch import Tensor


class Attend(ABC):
    """``site``: the model's attention, whose operands (B,H,M,D), (B,HK,N,D), (B,HK,N,DV) a composition gets; ``loads``: its
    side tensors; ``device``: where all of them are."""

    site: AttentionSite
    loads: tuple[Tensor, ...]
    device: torch.device

    @abstractmethod
    def __call__(self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        """O (B,H,M,DV) of ``site``, whose side tensors are those of the model and ``more``, constants on any device among them."""

    @abstractmethod
    def with_lse(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """O, and the natural log-sum-exp of each row (B,H,M), float32 or float64: -inf where a row keeps no key."""

    @abstractmethod
    def given(self, name: str) -> Tensor:
        """The tensor of whole numbers, one for each key, that the caller hands to the model by this name: (N) or (B or 1, N)."""

    @abstractmethod
    def number(self, size: sympy.Expr | int) -> int:
        """A size as a number, or as a node that stands for one."""

    @abstractmethod
    def arange(self, end: int) -> Tensor:
        """0, 1, ... below ``end``, int64, on the device."""

    @abstractmethod
    def constant(self, tensor: Tensor) -> Tensor:
        """A tensor that the variant computed, on the device; in a graph one of its buffers."""

    @abstractmethod
    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros on the device."""


def beside(site: AttentionSite, shape: Sequence[sympy.Expr | int], dtype: torch.dtype) -> tuple[AttentionSite, int]:
    """``site`` with one more side tensor, and its slot."""
    side = SideTensor(tuple(sympy.sympify(n) for n in shape), dtype)
    return site.replace(side=(*site.side, side)), len(site.side)


def read(slot: int, *indices: Expr, dtype: torch.dtype) -> Load:
    """One element of the side tensor in ``slot``."""
    return Load(slot, indices, dtype)


class Within(Attend):
    """The calls of ``whole`` in place of another site, with the same side tensors: a part of what it replaces."""

    def __init__(self, whole: Attend, site: AttentionSite) -> None:
        self.whole, self.site, self.loads, self.device = whole, site, whole.loads, whole.device

    def __call__(self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        return self.whole(site, query, key, value, more)

    def with_lse(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        return self.whole.with_lse(site, query, key, value, more)

    def given(self, name: str) -> Tensor:
        return self.whole.given(name)

    def number(self, size: sympy.Expr | int) -> int:
        return self.whole.number(size)

    def arange(self, end: int) -> Tensor:
        return self.whole.arange(end)

    def constant(self, tensor: Tensor) -> Tensor:
        return self.whole.constant(tensor)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.whole.zeros(*shape, dtype=dtype)
