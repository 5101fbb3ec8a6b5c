"""Structure: what every element of a tensor is, in closed form.

The tables that models keep for their attention are few: a triangle or a band of one value among another (causal masks and windows,
as booleans, numbers or additive masks), one value throughout, positions. A tensor that is exactly one of these, bit by bit,
is as good as the operations that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnfx import expr
from attnfx.expr import Expr

#: Tensors of more bytes are not read.
LARGEST = 64 * 2**20
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Less = Callable[[Expr, Expr], Expr]
Bits = tuple[int, ...]


@dataclass(frozen=True)
class Affine:
    """Integers: ``first`` plus each index times its slope."""

    dtype: torch.dtype
    first: int
    slopes: tuple[int, ...]

    def element(self, index: tuple[Expr, ...], less: Less) -> Expr:
        return expr.add(_weighted(self.slopes, index), expr.integer(self.first))


@dataclass(frozen=True)
class Band:
    """``on`` where ``low <= d <= high`` and ``off`` elsewhere, ``d`` being the sum of the indices times their weights: row minus
    column, or one index. A bound may be missing; without both there is one value. ``bits``: of both values, since zeros have
    signs that comparisons do not see."""

    dtype: torch.dtype
    weights: tuple[int, ...]
    low: int | None
    high: int | None
    on: float
    off: float
    bits: Bits

    def element(self, index: tuple[Expr, ...], less: Less) -> Expr:
        """The element at ``index``; ``less`` compares integers."""
        inside: Expr = expr.TRUE
        if self.low is not None or self.high is not None:
            d = _weighted(self.weights, index)
            if self.low is not None:
                inside = less(expr.integer(self.low - 1), d)
            if self.high is not None:
                inside = expr.logical_and(inside, less(d, expr.integer(self.high + 1)))
        for condition, pair in ((inside, (1, 0)), (expr.logical_not(inside), (0, 1))):
            if (self.on, self.off) == pair and inside != expr.TRUE:
                return expr.cast(condition, self.dtype)
        on, off = (expr.constant(value, self.dtype) for value in (self.on, self.off))
        return expr.where(inside, on, off, self.dtype)


Structure = Affine | Band


def fit(t: Tensor) -> Structure | None:
    """The structure of a tensor, equal to it in every bit; None where it has none of those known here.

    Reads the tensor: on a device, this waits for it.
    """
    if t.dtype not in (torch.bool, *_INTEGERS, *_FLOATS) or t.layout != torch.strided or t.is_neg():
        return None
    if not 0 < t.numel() * t.element_size() <= LARGEST:
        return None
    with _disable_current_modes(), torch.no_grad():
        bits = t.detach().view(_BITS[t.element_size()]).squeeze()
        return _affine(t, bits) or _band(t, bits)


@dataclass(frozen=True, eq=False)
class Values:
    """All values of a tensor, in memory of their own; equal to others that are the same in every bit."""

    tensor: Tensor

    @staticmethod
    def of(t: Tensor) -> Values | None:
        """The values of ``t``; None where it is empty or large, or not one of the dtypes known here."""
        if t.dtype not in (torch.bool, *_INTEGERS, *_FLOATS) or t.is_neg() or not 0 < t.numel() * t.element_size() <= LARGEST:
            return None
        with _disable_current_modes(), torch.no_grad():
            return Values(t.detach().clone(memory_format=torch.contiguous_format))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return NotImplemented
        a, b = self.tensor, other.tensor
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        with _disable_current_modes():
            return torch.equal(a.view(_BITS[a.element_size()]), b.view(_BITS[b.element_size()]))


def _weighted(weights: tuple[int, ...], index: tuple[Expr, ...]) -> Expr:
    total: Expr = expr.integer(0)
    for weight, at in zip(weights, index, strict=True):
        if weight:
            total = expr.add(total, expr.mul(at, expr.integer(weight)))
    return total


def _spread(t: Tensor, values: tuple[int, ...]) -> tuple[int, ...]:
    """``values``, one for each axis along which there are several elements, with zeros for the other axes."""
    rest = iter(values)
    return tuple(next(rest) if size > 1 else 0 for size in t.shape)


def _affine(t: Tensor, bits: Tensor) -> Affine | None:
    if t.dtype not in _INTEGERS or not bits.dim():
        return None
    core = t.detach().squeeze()
    ends = [0] * core.dim()
    first = int(core[tuple(ends)])
    slopes = tuple(int(core[tuple(int(k == axis) for k in range(core.dim()))]) - first for axis in range(core.dim()))
    last = first + sum(slope * (size - 1) for slope, size in zip(slopes, core.shape, strict=True))
    if not any(slopes) or int(core[tuple(size - 1 for size in core.shape)]) != last:
        return None
    made: Tensor | int = first
    for axis, (slope, size) in enumerate(zip(slopes, core.shape, strict=True)):
        shape = [size if k == axis else 1 for k in range(core.dim())]
        made = made + slope * torch.arange(size, device=core.device).view(shape)
    return Affine(t.dtype, first, _spread(t, slopes)) if bool((core == made).all()) else None


def _band(t: Tensor, bits: Tensor) -> Band | None:
    if bits.dim() == 2:
        if not torch.equal(bits[1:, 1:], bits[:-1, :-1]):
            return _made(t, bits.reshape(-1), ()) if torch.equal(bits, bits[:1, :1].expand_as(bits)) else None
        diagonals, least = torch.cat([bits[0].flip(0), bits[1:, 0]]), 1 - bits.shape[1]
        weights: tuple[int, ...] = (1, -1)
    elif bits.dim() < 2:
        diagonals, least, weights = bits.reshape(-1), 0, (1,) * bits.dim()
    else:
        return _made(t, bits.reshape(-1)[:1], ()) if torch.equal(bits, bits.flatten()[0].expand_as(bits)) else None
    changes = (diagonals[1:] != diagonals[:-1]).nonzero().flatten() + 1
    if changes.numel() > 2:
        return None
    return _made(t, diagonals, weights, least, *changes.tolist())


def _made(t: Tensor, diagonals: Tensor, weights: tuple[int, ...], least: int = 0, *changes: int) -> Band | None:
    """The band of values that change at the positions ``changes`` of ``diagonals``, which begin with ``least``."""
    picked = diagonals[[0, *changes]]
    known, values = picked.tolist(), picked.view(t.dtype).tolist()
    if any(math.isnan(value) for value in values) or (len(changes) == 2 and known[0] != known[2]):
        return None
    weights = _spread(t, weights) if changes else (0,) * t.dim()
    if not changes:
        return Band(t.dtype, weights, None, None, values[0], values[0], (known[0], known[0]))
    high = changes[1] - 1 + least if len(changes) == 2 else None
    return Band(t.dtype, weights, changes[0] + least, high, values[1], values[0], (known[1], known[0]))
