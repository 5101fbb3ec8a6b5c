"""Masks without closed form, at sizes that do not fit into tiles: documents, regions, neighbourhoods, dilations, padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lowering_sites import SCALED, B, Example, H, I, J, causal, load, side, site
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.sites.band import Band

BATCH, QUERIES, KEYS = 2, 390, 460
INT = torch.int64


def document_ids(*shape: int, mean: int = 60, seed: int = 0) -> Tensor:
    """Runs of ascending ids along the last axis."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < 1 / mean).long().cumsum(-1)


def same(a: Expr, b: Expr, slot: int = 0, dtype: torch.dtype = INT) -> Expr:
    return expr.eq(load(slot, B, a, dtype=dtype), load(slot, B, b, dtype=dtype))


def near(width: int, radius: int) -> Expr:
    def apart(f: Any) -> Expr:
        return expr.le(expr.call("abs", expr.sub(f(I, expr.integer(width)), f(J, expr.integer(width)))), expr.integer(radius))

    return expr.logical_and(apart(expr.floordiv), apart(expr.mod))


def sized(keep: Expr, **changes: Any) -> Any:
    return site(SCALED, keep, **{"batch": BATCH, "heads": 1, "key_heads": 1, "queries": QUERIES, "keys": KEYS, **changes})


def masks() -> Iterator[Example]:
    """Sites of B 2, H 1 or 2, M 390, N 460, with the tensors that their masks load."""
    both, ids = expr.logical_and, document_ids(BATCH, KEYS)
    per_batch = (side(BATCH, KEYS, dtype=INT),)
    yield Example("documents", sized(both(causal(), same(I, J)), side=per_batch), lambda dtype: (ids,))
    narrow = (side(BATCH, KEYS, dtype=torch.int32),)
    documents = sized(same(I, J, dtype=torch.int32), side=narrow, empty_rows="zero")
    yield Example("documents, int32", documents, lambda dtype: (ids.int(),))
    shared = expr.eq(load(0, I, dtype=INT), load(0, J, dtype=INT))
    yield Example("documents of all", sized(both(shared, causal(70)), side=(side(KEYS, dtype=INT),)), lambda dtype: (ids[0],))
    regions = torch.arange(KEYS).floor_divide(256).remainder(2).expand(2, KEYS)
    of_heads = expr.eq(load(0, H, I, dtype=INT), load(0, H, J, dtype=INT))
    yield Example("regions of heads", sized(of_heads, side=(side(2, KEYS, dtype=INT),), heads=2), lambda dtype: (regions + 0,))
    yield Example("neighbourhood", sized(near(33, 2), fill=-1e4, empty_rows="fill"))
    dilated = expr.eq(expr.mod(I - J, expr.integer(3)), expr.integer(0))
    yield Example("dilation in documents", sized(both(dilated, same(I, J)), side=per_batch), lambda dtype: (ids,))
    sinks = both(causal(), expr.logical_or(expr.lt(I - J, expr.integer(100)), expr.lt(J, expr.integer(9))))
    yield Example("window or sinks", sized(sinks))
    padded = both(causal(), load(0, B, J, dtype=torch.bool))
    lengths = torch.tensor([300, 130])
    kept = torch.arange(KEYS) < lengths[:, None]
    for rows in ("nan", "zero"):
        made = sized(padded, side=(side(BATCH, KEYS, dtype=torch.bool),), empty_rows=rows)
        yield Example(f"padding, {rows}", made, lambda dtype: (kept & (torch.arange(KEYS) >= 70),))
    ends = both(causal(), expr.lt(J, load(0, B, dtype=INT)))
    yield Example("lengths", sized(ends, side=(side(BATCH, dtype=INT),)), lambda dtype: (lengths,))
    table = torch.rand(2, 7, 10, generator=torch.Generator().manual_seed(3)) < 0.4
    of_blocks = load(0, H, *(expr.floordiv(x, expr.integer(64)) for x in (I, J)), dtype=torch.bool)
    made = sized(of_blocks, side=(side(2, 7, 10, dtype=torch.bool),), heads=2, empty_rows="zero")
    yield Example("blocks of heads", made, lambda dtype: (table,))
    floats = expr.le(expr.call("abs", load(0, B, I) - load(0, B, J)), expr.lift(2.5))
    yield Example("times", sized(floats, side=(side(BATCH, KEYS),)), lambda dtype: (torch.arange(BATCH * KEYS).view(2, -1) / 16,))
    yield from tables()


def tables() -> Iterator[Example]:
    """Tables of blocks, smaller and larger than tiles, aligned with them or not."""
    generator = torch.Generator().manual_seed(3)
    for rows, columns, shift in ((64, 16, 0), (24, 40, 5), (200, 130, 0)):
        chosen = torch.rand(BATCH, 2, -(-(QUERIES + shift) // rows), -(-KEYS // columns), generator=generator) < 0.15
        at = expr.floordiv(I + shift, expr.integer(rows)), expr.floordiv(J, expr.integer(columns))
        table = load(0, B, H, *at, dtype=torch.bool)
        made = sized(expr.logical_and(causal(70), table), side=(side(*chosen.shape, dtype=torch.bool),), heads=2, empty_rows="zero")
        yield Example(f"table of {rows} x {columns} from {shift}", made, lambda dtype, chosen=chosen: (chosen,))


def biased() -> Iterator[Example]:
    """Documents with a learned bias of each kind that the kernels have a gradient of."""
    keep, ids = expr.logical_and(causal(), same(I, J)), document_ids(BATCH, KEYS)
    forms = {"tile": ((QUERIES, KEYS), (I, J)), "column": ((KEYS, BATCH), (J, B)), "diagonal": ((QUERIES + KEYS,), (I - J + KEYS,))}
    for name, (shape, indices) in forms.items():
        sides = (side(BATCH, KEYS, dtype=INT), side(*shape, grad=True))
        made = sized(keep, side=sides).replace(score=SCALED + load(1, *indices))
        yield Example(f"bias {name}", made, lambda dtype, shape=shape: (ids, torch.randn(shape, requires_grad=True)))
    band = Band(None, 1, Int(J.value - I.value + QUERIES - 1), 16)
    made = sized(keep, side=(side(BATCH, KEYS, dtype=INT), side(1, 1, QUERIES + KEYS - 1, 16, grad=True)), band=band)
    vectors = (1, 1, QUERIES + KEYS - 1, 16)
    yield Example("bias of a second product", made, lambda dtype: (ids, torch.randn(vectors, requires_grad=True)))
