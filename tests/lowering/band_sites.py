"""Sites with a band: what models with relative keys mean, without the models. Shared by the tests of operators and kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lowering_sites import (
    BATCH,
    HEADS,
    KEYS,
    MIN32,
    QUERIES,
    SCALED,
    B,
    Example,
    H,
    I,
    J,
    causal,
    load,
    padding,
    side,
    site,
    window,
)
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.site import SideTensor
from attnfx.sites.band import Band

WIDTH = 16
LENGTH = QUERIES + KEYS - 1
#: The vectors in the order of j - i.
PLACE = Int(J.value - I.value + QUERIES - 1)


def banded(
    score: Expr = SCALED,
    keep: Expr = expr.TRUE,
    *,
    row: Expr = PLACE,
    left: bool = False,
    shape: tuple[int, ...] = (1, HEADS, LENGTH),
    before: tuple[SideTensor, ...] = (),
    band: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A site whose last side tensors are those of a band: its rows, where they are not the queries, and its vectors."""
    first = len(before)
    more = (side(BATCH, HEADS, QUERIES, WIDTH, grad=True),) if left else ()
    made = Band(first if left else None, first + len(more), row, WIDTH, **(band or {}))
    sides = (*before, *more, side(*shape, WIDTH, grad=True))
    return site(score, keep, side=sides, band=made, **changes)


Maker = Callable[[torch.dtype], Tensor]


def tensors(made: Any, *before: Maker) -> Callable[[torch.dtype], Sequence[Tensor]]:
    """The loads of a site made by :func:`banded`: what stands ``before`` the band, and its tensors."""

    def loads(dtype: torch.dtype) -> Sequence[Tensor]:
        shapes = [tuple(int(n) for n in t.shape) for t in made.side[len(before) :]]
        return [*(b(dtype) for b in before), *(learned(dtype, *s) for s in shapes)]

    return loads


def learned(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def example(name: str, made: Any, *before: Maker) -> Example:
    return Example(name, made, tensors(made, *before))


def examples() -> Iterator[Example]:
    yield example("band", banded())
    yield example("band of all heads", banded(shape=(1, 1, LENGTH)))
    yield example("band of each batch", banded(keep=causal(16), shape=(BATCH, HEADS, LENGTH)))
    yield example("band of one head, batches apart", banded(shape=(BATCH, 1, LENGTH)))
    yield example("band of other rows", banded(keep=causal(16), left=True))
    yield example("band, causal", banded(keep=causal(16), shape=(1, 1, LENGTH)))
    yield example("band, window", banded(keep=window(7)))
    backwards = Int(I.value - J.value + KEYS - 1)
    yield example("band, backwards, half of it", banded(row=backwards, band={"factor": 0.5}))
    clamped = expr.minimum(expr.maximum(Int(J.value - I.value), expr.integer(-5)), expr.integer(3)) + expr.integer(5)
    yield example("band, clipped", banded(row=clamped, shape=(1, 1, 9), left=True))
    yield example("band, kept in part", banded(band={"keep": expr.le(Int(J.value - I.value - 8), expr.integer(0))}))
    yield example("band in a softcap", banded(expr.call("tanh", SCALED) * 2.0, causal(16)))
    for additive in (False, True):
        more: dict[str, Any] = {"fill": -1e9 if additive else MIN32, "additive": additive, "empty_rows": "fill"}
        yield example(
            f"band, rows without keys, {'added' if additive else 'replaced'}", banded(keep=causal(-16), left=True, **more)
        )
    padded = expr.logical_and(causal(16), load(0, B, J, dtype=torch.bool))
    mask = side(BATCH, KEYS, dtype=torch.bool)
    yield example("band, padded", banded(keep=padded, before=(mask,), empty_rows="zero"), lambda dtype: padding(True))
    distances = banded(SCALED + load(0, H, Int(I.value - J.value + KEYS - 1)), before=(side(HEADS, LENGTH, grad=True),))
    yield example("band, and a number for each distance", distances, lambda dtype: learned(dtype, HEADS, LENGTH))
    tile = banded(SCALED + load(0, H, I, J), causal(16), before=(side(HEADS, QUERIES, KEYS, grad=True),))
    yield example("band, and a tile", tile, lambda dtype: learned(dtype, HEADS, QUERIES, KEYS))
    long = banded(keep=window(40), row=Int(J.value - I.value + 299), shape=(1, 1, 599), batch=1, queries=300, keys=300, key_heads=1)
    yield example("band, long", long)
    few = banded(row=Int(J.value - I.value + 2), shape=(1, HEADS, 90), queries=3, keys=88)
    yield example("band, few queries", few)
