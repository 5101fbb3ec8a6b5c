"""The band of a plan (:mod:`attnfx.sites.band`): the window that a call makes of its vectors, and which gradients it has.

The window is the last side tensor of a plan: (1 or B, 1 or H, M + N - 1, W), the vectors in the order of j - i. Autograd takes
its gradient back to the vectors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Int
from attnfx.lowering.gradients import BiasGradient
from attnfx.site import AttentionSite, SideTensor
from attnfx.sites.band import Band, I, J, distances, window

_HALVES = (torch.float16, torch.bfloat16)


def side(site: AttentionSite) -> tuple[SideTensor, ...]:
    """The window as a side tensor; () without a band."""
    band = site.band
    if band is None:
        return ()
    right = site.side[band.right]
    batch, heads, _, width = right.shape
    shape = (batch, heads, sympy.expand(distances(site.queries, site.keys)), width)
    # several distances may share a vector, whose gradient is summed in float32
    wide = right.requires_grad and site.dtype in _HALVES and not _apart(band)
    return (SideTensor(shape, torch.float32 if wide else right.dtype, right.requires_grad),)


def _apart(band: Band) -> bool:
    """Whether every distance has a vector of its own."""
    return isinstance(band.row, Int) and band.row.value.coeff(I) in (1, -1) and not band.row.value.coeff(I).has(I, J)


def build(site: AttentionSite, loads: Sequence[Tensor], queries: int, keys: int, values: Mapping[sympy.Symbol, int]) -> Tensor:
    """The window of one call; ``site`` is that of the plan."""
    assert site.band is not None
    right = loads[site.band.right]
    dtype = site.side[-1].dtype
    # an oracle computes in float64 what the plan has in float32
    wide = right.to(dtype) if dtype == torch.float32 and right.dtype in _HALVES else right
    return window(site.band, wide, queries, keys, values)


def from_window(site: AttentionSite, queries: int) -> AttentionSite:
    """A plan's site whose band reads its vectors from the window."""
    if site.band is None:
        return site
    return site.replace(band=replace(site.band, right=len(site.side) - 1, row=Int(J - I + queries - 1), keep=expr.TRUE))


def gradients(site: AttentionSite) -> tuple[BiasGradient, ...]:
    """Those of the left operand and of the window, the last of ``site.side``; queries that are the left operand have theirs
    in that of the queries."""
    band = site.band
    if band is None:
        return ()
    found = []
    if band.left is not None and site.side[band.left].requires_grad:
        found.append(BiasGradient(band.left, "left", False, False, ()))
    if site.side[-1].requires_grad:
        batch, heads, *_ = site.side[-1].shape
        found.append(BiasGradient(len(site.side) - 1, "window", bool(batch == 1), bool(heads == 1), ()))
    return tuple(found)


def slots(site: AttentionSite) -> tuple[int, ...]:
    """The side tensors of a plan's site whose gradients a kernel owes."""
    band = site.band
    if band is None:
        return ()
    return (len(site.side) - 1,) if band.left is None else (band.left, len(site.side) - 1)


#: The left operand (None: the queries), the window and its strides of batch and head (0 for what shares
#: one), distance and width, the factor: what the kernels are given.
Arguments = tuple[Tensor | None, Tensor, tuple[int, ...], float]


def arguments(site: AttentionSite, loads: Sequence[Tensor]) -> Arguments | None:
    """What the kernels are given of the band of a plan's site; None without one."""
    band = site.band
    if band is None:
        return None
    left, window = None if band.left is None else loads[band.left], loads[-1]
    strides = tuple(0 if n == 1 else s for n, s in zip(window.shape[:2], window.stride()[:2], strict=True))
    return left, window, (*strides, *window.stride()[2:]), band.factor


def objections(site: AttentionSite, family: str) -> tuple[str, ...]:
    """Why the band of a site has no plan, one sentence each."""
    band = site.band
    if band is None:
        return ()
    found = list(band.objections)
    if family == "flash" and band.width != site.head_dim:
        found.append(
            f"a second product has the width {band.width} and the first {site.head_dim}; the flash kernels take equal ones."
        )
    if any(site.side[s].dtype != site.dtype for s in band.slots):
        found.append("the tensors of a second product have another dtype than the queries.")
    return tuple(found)
