"""An enclosure evaluated with torch, for all tiles of an attention at once: which are full, which are empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import sympy
import torch
from torch import Tensor

from attnfx.algebra.evaluate import Value, evaluate
from attnfx.algebra.interval_arithmetic import FIRST, LAST
from attnfx.algebra.intervals import Enclosure, Profile


@dataclass(frozen=True)
class Tiling:
    """Queries and keys in tiles of ``rows`` x ``columns``; the last ones hold what is left. ``batch`` and ``heads`` are 1 where
    the predicate does not depend on them."""

    batch: int
    heads: int
    queries: int
    keys: int
    rows: int
    columns: int


def kinds(
    found: Enclosure, tiling: Tiling, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, Value], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(certainly kept entirely, possibly kept somewhere) of each tile, bool (batch, heads, row tiles, key tiles)."""
    ends = [end for p in found.profiles for end in profile_ends(p, tiling, loads, values, device)]
    return kinds_between(found, tiling, ends, values, device)


def kinds_between(
    found: Enclosure, tiling: Tiling, ends: Sequence[Tensor], values: Mapping[sympy.Symbol, Value], device: torch.device
) -> tuple[Tensor, Tensor]:
    """:func:`kinds` from the ends of the profiles, two for each."""
    t = tiling
    i_first, j_first = (torch.arange(0, n, step, device=device) for n, step in ((t.queries, t.rows), (t.keys, t.columns)))
    corners = {
        FIRST["i"]: i_first[:, None], LAST["i"]: (i_first + t.rows).clamp(max=t.queries)[:, None] - 1,
        FIRST["j"]: j_first, LAST["j"]: (j_first + t.columns).clamp(max=t.keys) - 1,
    }  # fmt: skip
    numbers: dict[sympy.Symbol, Value] = {**values, **corners}
    shape = (t.batch, t.heads, i_first.numel(), j_first.numel())
    must, may = (evaluate(e, _points(t, device), ends, numbers).expand(shape) for e in (found.must, found.may))
    return must, may | must


def profile_ends(
    profile: Profile, tiling: Tiling, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, Value], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The least and the largest value of a profile in each tile of its side, (batch, heads, row tiles, 1) or
    (batch, heads, 1, key tiles); of a table of blocks in each tile."""
    if profile.side == "ij":
        return _table_ends(profile, tiling, loads, values, device)
    t, rows = tiling, profile.side == "i"
    length, step = (t.queries, t.rows) if rows else (t.keys, t.columns)
    at = torch.arange(-(-length // step) * step, device=device).clamp(
        max=length - 1
    )  # the last element again, which changes no end
    value = evaluate(profile.value, {**_points(t, device), profile.side: at}, loads, values, clamp=True)
    value = value if value.dtype.is_floating_point else value.long()
    tiles = value.expand(t.batch, t.heads, 1, at.numel())[:, :, 0].reshape(t.batch, t.heads, -1, step)
    low, high = tiles.amin(-1), tiles.amax(-1)  # a NaN is both
    return (low[..., None], high[..., None]) if rows else (low[..., None, :], high[..., None, :])


def _table_ends(
    profile: Profile, t: Tiling, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, Value], device: torch.device
) -> tuple[Tensor, Tensor]:
    at, counts = [], profile.samples(t.rows, t.columns)
    for length, size, step, count in zip((t.queries, t.keys), (t.rows, t.columns), profile.steps, counts, strict=True):
        first = torch.arange(0, length, size, device=device)[:, None]
        last = (first + size).clamp(max=length) - 1
        at.append(torch.minimum(first + torch.arange(count, device=device) * step, last).flatten())
    points = {**_points(t, device), "i": at[0][:, None], "j": at[1]}
    value = evaluate(profile.value, points, loads, values, clamp=True).long()
    value = value.expand(t.batch, t.heads, *(len(a) for a in at))
    value = torch.unflatten(torch.unflatten(value, 3, (-1, counts[1])), 2, (-1, counts[0]))
    # one sample beside another: a reduction over short axes takes many times as long
    low, high = (reduce(pick, value.unbind(5)) for pick in (torch.minimum, torch.maximum))
    return reduce(torch.minimum, low.unbind(3)), reduce(torch.maximum, high.unbind(3))


def _points(t: Tiling, device: torch.device) -> dict[str, Tensor]:
    return {
        "b": torch.arange(t.batch, device=device).view(-1, 1, 1, 1),
        "h": torch.arange(t.heads, device=device).view(-1, 1, 1),
    }
