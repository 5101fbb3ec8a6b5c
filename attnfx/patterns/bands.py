"""Bands: products of a vector of each query with one of each distance, added to the scores (see :mod:`attnfx.sites.band`).

The logits read such a product, a contraction of its own, at a place that is a function of i - j: after a shift by padding and a
view, a gather, or because one operand was gathered by distances. What a shift reads on the wrong side of its diagonal is a product
of other queries; it is no obstacle where it is zero, or where a mask puts away what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.algebra.summands import summands
from attnfx.expr import Call, Const, Expr, Int, Load, Score
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.axes import Extents, Operand, history, rooted, understood
from attnfx.patterns.candidate import Refused
from attnfx.patterns.contraction import contraction
from attnfx.patterns.lift import Dot, Index, Lifter
from attnfx.patterns.regions import Region
from attnfx.patterns.versions import Past, as_read, obtainable
from attnfx.sites.facts import Facts

#: The summed axis of a band, and the axis of distances.
WIDTH, ROW = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("attnfx_width", "attnfx_row"))
#: A fill at or below this hides the scores that it is added to.
HOPELESS = -1e30


@dataclass(frozen=True)
class Setting:
    """Where a band is looked for: ``until`` reads everything, ``atoms`` are the symbols of batches and heads, ``facts`` those of
    the mask, ``fill`` and ``additive`` what it does; ``lifter`` makes a reader of elements for a node."""

    mirror: Mirror
    until: fx.Node
    extents: Extents
    i: sympy.Symbol
    j: sympy.Symbol
    atoms: frozenset[sympy.Symbol]
    facts: Facts
    fill: float
    additive: bool
    lifter: Callable[[], Lifter]


@dataclass(frozen=True)
class Found:
    """A band in the matcher's symbols: ``left`` carries batches, heads, i and WIDTH, ``right`` ROW in the place of ``row``;
    ``factor`` times as much of it as of q.k."""

    left: Operand
    right: Operand
    row: Expr
    keep: Expr
    factor: float
    dtype: torch.dtype
    extents: Extents


@dataclass(frozen=True)
class _Product:
    """``factor`` times the contraction that ``load`` reads where ``keep``, else zero."""

    load: Load
    keep: Expr = expr.TRUE
    factor: float = 1.0


def banded(z: Expr, setting: Setting) -> tuple[Expr, Found] | None:
    """Logits ``z`` without their band, which :class:`Score` holds from then on, and the band; None where they have none."""
    for node in expr.walk(z):
        if not (isinstance(node, Call) and node.op in ("add", "sub") and node.dtype.is_floating_point):
            continue
        parts = list(summands(node))
        unit = sum(c for part, c in parts if isinstance(part, Score))
        outside = expr.rebuild(z, lambda n, node=node: expr.ONE if n == node else None)  # type: ignore[misc]
        mixed = any(has_score(part) for part, _ in parts if not isinstance(part, Score))
        if not unit or mixed or has_score(outside):
            continue
        for part, c, rest in _candidates(node, parts):
            products = [n for n in expr.walk(part) if isinstance(n, Load) and isinstance(n.slot, Dot)]
            if len(products) != 1 or rest is None or products[0] in expr.walk(rest):
                continue
            found = _found(part, c / unit, setting)
            if found is not None:
                return expr.rebuild(z, lambda n, node=node, rest=rest: rest if n == node else None), found  # type: ignore[misc]
    return None


def _candidates(node: Expr, parts: Sequence[tuple[Expr, float]]) -> Iterator[tuple[Expr, float, Expr | None]]:
    """The summands of ``node`` with their factors, each with the sum without it; and those of a summand that a mask hides in
    part: what is added to a hopelessly low number is lost."""
    for part, c in parts:
        yield part, c, _without(node, part)
        if not (isinstance(part, Call) and part.op == "where"):
            continue
        condition, a, b = part.args
        for shown, low in ((a, b), (b, a)):
            if not (isinstance(low, Const) and low.dtype.is_floating_point and low.value <= HOPELESS):
                continue
            for inner, by in summands(shown, c):
                left = _without(shown, inner) or expr.constant(0.0, shown.dtype)
                chosen = (left, low) if shown is a else (low, left)
                masked = expr.where(condition, chosen[0], chosen[1], part.dtype)
                yield inner, by, expr.rebuild(node, lambda n, part=part, masked=masked: masked if n == part else None)  # type: ignore[misc]


def _without(e: Expr, part: Expr) -> Expr | None:
    """A sum without one of its summands; None for nothing."""
    if e == part:
        return None
    if isinstance(e, Call) and e.op in ("add", "sub", "mul", "div", "cast", "neg"):
        rest = [_without(a, part) for a in e.args]
        if all(new is old for new, old in zip(rest, e.args, strict=True)):
            return e
        if e.op in ("add", "sub"):
            left, right = rest
            if right is None:
                return left
            if left is None:
                return right if e.op == "add" else expr.call("neg", right, dtype=e.dtype)
        if any(r is None for r in rest):
            return None
        return Call(e.op, tuple(r for r in rest if r is not None), e.dtype)
    return e


def _found(part: Expr, factor: float, setting: Setting) -> Found | None:
    for product in _readings(part, setting):
        found = _operands(product, setting)
        if found is not None:
            left, right, row, extents = found
            return Found(left, right, row, product.keep, factor * product.factor, product.load.dtype, extents)
    return None


def _readings(part: Expr, setting: Setting) -> Iterator[_Product]:
    """The summand as a product of its own query everywhere; or on its side of the diagonal of the mask, where what it is on
    the other side is zero, or is not seen."""
    s, ranges = setting, setting.extents.ranges
    plain = _product(Region(s.i, s.j, ranges).expression(part))
    if isinstance(plain, _Product):
        yield plain
    for low in s.facts.delta_low:
        offset = sympy.expand(-low)
        inside = _product(Region(s.i, s.j, ranges, offset).expression(part))
        if not isinstance(inside, _Product):
            continue
        before = expr.le(Int(sympy.expand(s.j - s.i - offset)), expr.integer(0))
        if _product(Region(s.i, s.j, ranges, offset, beyond=True).expression(part)) == 0.0:
            yield _Product(inside.load, expr.logical_and(inside.keep, before), inside.factor)
        elif hides(s.fill, s.additive) and not _masks(part):
            yield inside


def hides(fill: float, additive: bool) -> bool:
    """Whether nothing is seen of a score where a mask has put its fill, or added it."""
    return not additive or fill <= HOPELESS


def _masks(part: Expr) -> bool:
    """Whether a summand may hold the mask itself, which would go with it."""
    return any(isinstance(n, Const) and n.dtype.is_floating_point and n.value <= HOPELESS for n in expr.walk(part))


def _product(e: Expr) -> _Product | float | None:
    """A resolved summand as a product under a condition, as the number zero, or as neither."""
    if isinstance(e, Load):
        return _Product(e) if isinstance(e.slot, Dot) else None
    if expr.is_number(e, 0):
        return 0.0
    if not isinstance(e, Call) or not e.dtype.is_floating_point:
        return None
    match e.op, e.args:
        case "cast", (inner,) if inner.dtype.is_floating_point:
            return _product(inner)
        case "where", (condition, a, b):
            first, second = _product(a), _product(b)
            if second == 0.0:
                return _under(first, condition)
            return _under(second, expr.logical_not(condition)) if first == 0.0 else None
        case "mul", (a, b):
            for x, other in ((a, b), (b, a)):
                if isinstance(x, Call) and x.op == "cast" and x.args[0].dtype == torch.bool:
                    return _under(_product(other), x.args[0])
                if isinstance(x, Const) and x.dtype.is_floating_point:
                    return _times(_product(other), float(x.value))
        case "div", (a, Const() as by) if by.value:
            return _times(_product(a), 1.0 / float(by.value))
    return None


def _under(product: _Product | float | None, condition: Expr) -> _Product | float | None:
    if isinstance(product, _Product):
        return _Product(product.load, expr.logical_and(product.keep, condition), product.factor)
    return product


def _times(product: _Product | float | None, factor: float) -> _Product | float | None:
    if factor == 0.0 or product == 0.0:
        return 0.0 if product is not None else None
    return _Product(product.load, product.keep, product.factor * factor) if isinstance(product, _Product) else None


# Operands -------------------------------------------------------------------------------------------------------------------


def _operands(product: _Product, setting: Setting) -> tuple[Operand, Operand, Expr, Extents] | None:
    """(left, right, row, extents) where one side of the contraction is a vector of each query, and the other of each distance."""
    s, load = setting, product.load
    assert isinstance(load.slot, Dot)
    made = contraction(load.slot.node)
    if made is None or not _relative(product.keep, s):
        return None
    extents = Extents({**s.extents.sizes, WIDTH: made.summed}, s.extents.known)
    if not made.summed.is_Integer:
        return None
    sides = made.sides(load.indices, Int(WIDTH))
    with_j = [any(expr.symbols(x) & {s.j} for x in at) for _, at in sides]
    if with_j[0] == with_j[1]:
        return None
    (left, left_at), (right, right_at) = sides if with_j[1] else sides[::-1]
    alone = frozenset((s.i, s.j, WIDTH, ROW))
    lifter = s.lifter()
    try:
        steps = history(lifter, left, left_at, made.node)
        query = rooted(s.mirror, steps, made.node, s.until, extents, alone, "queries of a second product")
    except Refused:
        return None
    if not {s.i, WIDTH} <= query.symbols <= {s.i, WIDTH, *s.atoms}:
        return None
    lifter.reader = made.node
    for node, at, after in _older(lifter, right, right_at, made.node, s):
        found = _vectors(node, at, extents, s)
        if found is not None and obtainable(s.mirror, Past(node, after), s.until):
            vectors, row, whole = found
            return query, Operand(node, vectors.axes, after), row, whole
    return None


def _older(lifter: Lifter, node: fx.Node, at: Index, reader: fx.Node, s: Setting) -> Iterator[tuple[fx.Node, Index, fx.Node]]:
    """A tensor and the forms it had before, oldest first, each with the last write before it was read."""
    found = lifter.element(node, at)
    while isinstance(found, Call) and found.op == "cast" and found.args[0].dtype.is_floating_point:
        found = found.args[0]
    if isinstance(found, Load) and isinstance(found.slot, fx.Node | Past):
        past = found.slot if isinstance(found.slot, Past) else Past(found.slot, found.slot)
        yield past.node, found.indices, past.after
    forms = []
    for older, where in history(lifter, node, at, reader):
        forms.append((older, where, as_read(s.mirror, older, reader).after))
        if s.mirror.storage.get(older) != s.mirror.storage.get(node):
            break
    yield from reversed(forms)


def _vectors(node: fx.Node, at: Index, extents: Extents, s: Setting) -> tuple[Operand, Expr, Extents] | None:
    """(the tensor, its row, extents) where one axis is a function of i - j and no other one knows i or j."""
    places = [k for k, x in enumerate(at) if expr.symbols(x) & {s.i, s.j}]
    if len(places) != 1 or not {s.i, s.j} <= expr.symbols(at[places[0]]) or not _relative(at[places[0]], s):
        return None
    whole = Extents({**extents.sizes, ROW: sizes(node)[places[0]]}, extents.known)
    replaced = tuple(Int(ROW) if k in places else x for k, x in enumerate(at))
    made = understood(node, replaced, whole, frozenset((s.i, s.j, WIDTH, ROW)))
    if made is None or not {ROW, WIDTH} <= made.symbols <= {ROW, WIDTH, *s.atoms}:
        return None
    return made, at[places[0]], whole


def _relative(e: Expr, s: Setting) -> bool:
    """Whether ``e`` is a formula of i - j and sizes."""
    if any(isinstance(n, Load | Score) for n in expr.walk(e)) or not expr.symbols(e).isdisjoint(s.atoms):
        return False
    return expr.substitute(e, {s.i: s.i + 1, s.j: s.j + 1}) == e
