"""Keys and values of several products laid together along the keys: new nodes, computed where the attention is spliced in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Int
from attnfx.graphs.callees import derive
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.axes import Extents, Operand, history, understood
from attnfx.patterns.contraction import Contraction
from attnfx.patterns.lift import Index, Lifter

_ATEN: Any = torch.ops.aten
_T, _D = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "td")


@dataclass(frozen=True)
class Piece:
    """Keys ``start`` to ``start + length`` of the whole: their product with the queries, and where the whole's element reads it."""

    start: int
    length: int
    made: Contraction
    at: Index


@dataclass(frozen=True)
class Share:
    """Probabilities ``start`` to ``start + length``: side ``side`` of a contraction with values."""

    start: int
    length: int
    made: Contraction
    side: int


def one_product(mirror: Mirror, pieces: Sequence[Piece], shape: Sequence[sympy.Expr], axis: int) -> fx.Node:
    """The product of the queries with all keys, of the sizes and axes of the logits. Raises LookupError where there is none."""
    symbols = _symbols(shape)
    lengths, j = dict(zip(symbols, shape, strict=True)), symbols[axis]
    at = max((p.made.node for p in pieces), key=lambda n: mirror.position[n])
    queries, keys, roots = list[Operand](), list[Operand](), set[tuple[fx.Node, Index]]()
    for piece in pieces:
        extents = Extents({**lengths, j: sympy.Integer(piece.length), _D: piece.made.summed}, mirror.ranges)
        inside = tuple(expr.substitute(x, {j: j + piece.start}) for x in piece.at)
        sides = piece.made.sides(inside, Int(_D))
        if any(j in expr.symbols(x) for x in sides[0][1]):
            sides = sides[::-1]
        query, key = (understood(*side, extents, frozenset((*symbols, _D))) for side in sides)
        if query is None or key is None or j in query.symbols or j not in key.symbols:
            raise LookupError("axes of a product that cannot be told apart")
        _steady(mirror, (query.node, key.node), piece.made.node, at)
        roots.add(history(Lifter(mirror, extents.ranges, at=at), *sides[0], piece.made.node)[-1])
        queries.append(query)
        keys.append(key)
    first = pieces[0].made
    if len(roots) != 1 or len({n.meta["val"].dtype for p in pieces for n in (p.made.node, p.made.left, p.made.right)}) != 1:
        raise LookupError("products of different queries or dtypes")
    shared = [s for s in symbols if any(s in k.symbols for k in keys) and s != j]
    order = [s for s in (*symbols, _D) if s in queries[0].symbols]
    if set(symbols) != {*shared, *order, j} - {_D} or set(symbols) == {*shared, j}:
        raise LookupError("axes of the logits that no product has, or none of the queries' own")
    lengths[_D] = first.summed
    parts = [
        _arranged(mirror, at, part, [*shared, j, _D], {**lengths, j: sympy.Integer(piece.length)})
        for part, piece in zip(keys, pieces, strict=True)
    ]
    joined, rows = derive(mirror, at, _ATEN.cat.default, parts, len(shared)), _arranged(mirror, at, queries[0], order, lengths)
    letters = {s: chr(ord("a") + k) for k, s in enumerate((*symbols, _D))}
    left, right, result = ("".join(letters[s] for s in axes) for axes in (order, [*shared, j, _D], symbols))
    dot = derive(mirror, at, _ATEN.einsum.default, f"{left},{right}->{result}", [rows, joined])
    if dot.meta["val"].dtype != first.node.meta["val"].dtype:
        raise LookupError("products in another dtype than their operands'")
    return dot


def one_value(mirror: Mirror, shares: Sequence[Share], output: fx.Node) -> tuple[fx.Node, list[int | None]]:
    """All values, and for each of their axes the axis of the result that it is, None for the keys. Raises LookupError where
    there are none."""
    symbols, found = _symbols(sizes(output)), list[Operand]()
    lengths = dict(zip(symbols, sizes(output), strict=True))
    at = max((share.made.node for share in shares), key=lambda n: mirror.position[n])
    for share in shares:
        extents = Extents({**lengths, _T: share.made.summed}, mirror.ranges)
        side = share.made.sides(tuple(map(Int, symbols)), Int(_T))[1 - share.side]
        value = understood(*side, extents, frozenset((*symbols, _T)))
        if value is None or _T not in value.symbols or sizes(share.made.node) != sizes(output):
            raise LookupError("axes of values that cannot be told apart")
        _steady(mirror, (value.node,), share.made.node, at)
        found.append(value)
    if len({v.node.meta["val"].dtype for v in found}) != 1:
        raise LookupError("values of several dtypes")
    own = [s for s in symbols if any(s in v.symbols for v in found)]
    order = [*own[:-1], _T, *own[-1:]]
    parts = [_arranged(mirror, at, v, order, {**lengths, _T: share.made.summed}) for v, share in zip(found, shares, strict=True)]
    joined = parts[0] if len(parts) == 1 else derive(mirror, at, _ATEN.cat.default, parts, order.index(_T))
    return joined, [None if s == _T else symbols.index(s) for s in order]


def _symbols(shape: Sequence[sympy.Expr]) -> list[sympy.Symbol]:
    return [sympy.Symbol(f"o{k}", integer=True, nonnegative=True) for k in range(len(shape))]


def _steady(mirror: Mirror, nodes: Sequence[fx.Node], reader: fx.Node, until: fx.Node) -> None:
    """Raises LookupError where one of ``nodes`` is written between its reader and ``until``."""
    for node in nodes:
        if mirror.writers(node, mirror.position[reader], mirror.position[until] + 1):
            raise LookupError(f"{node.name} is changed in place")


def _arranged(
    mirror: Mirror, at: fx.Node, operand: Operand, order: Sequence[sympy.Symbol], lengths: Mapping[sympy.Symbol, sympy.Expr]
) -> fx.Node:
    """``operand`` with one axis for each symbol of ``order``; those that it has not are expanded."""
    node, held = operand.node, [axis[0] if axis else None for axis in operand.axes]
    if any(len(axis) > 1 for axis in operand.axes) or not all(lengths[s].is_Integer for s in order if s not in held):
        raise LookupError("folded axes, or sizes known only at run time")
    for k in reversed([k for k, s in enumerate(held) if s is None]):
        node = derive(mirror, at, _ATEN.select.int, node, k, 0)
    kept = [s for s in held if s is not None]
    places = [kept.index(s) for s in order if s in kept]
    if places != sorted(places):
        node = derive(mirror, at, _ATEN.permute.default, node, places)
    for k in (k for k, s in enumerate(order) if s not in kept):
        node = derive(mirror, at, _ATEN.unsqueeze.default, node, k)
    if any(s not in kept for s in order):
        node = derive(mirror, at, _ATEN.expand.default, node, [-1 if s in kept else int(lengths[s]) for s in order])
    return node
