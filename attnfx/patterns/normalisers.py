"""Normalisers: divisors that are formulas of the sum of a row's weights, in whatever spelling that sum is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Load, Score
from attnfx.graphs.mirror import Mirror, is_tensor
from attnfx.patterns.candidate import Refused
from attnfx.patterns.lift import Index, operation
from attnfx.patterns.products import Divisor, Factor, Product, scale, sums_of
from attnfx.patterns.readings import Reading, ScoreLifter, expanded
from attnfx.sites.feature_maps import RAW


@dataclass(frozen=True)
class Divided:
    """``normaliser``, ``divisor`` and ``divisor_detached`` of a site, the divisor in the reading's index symbols; ``sums``: the
    nodes that are row sums."""

    normaliser: str = "none"
    divisor: Expr = RAW
    detached: bool = False
    sums: frozenset[fx.Node] = frozenset()


def normalised(mirror: Mirror, number: Callable[[fx.Node], int], reading: Reading) -> Divided | fx.Node:
    """The normaliser of a reading, or the division that is none and has to be taken whole."""
    found = Divided()
    for divisor in reading.product.divisors:
        made = _row_divisor(mirror, number, reading, divisor)
        if made is None and (part := _of_the_values(reading)) is not None:
            return part
        if made is None or found.normaliser != "none":
            return divisor.at
        found = made
    return found


def _of_the_values(reading: Reading) -> fx.Node | None:
    """A multiplication or mask that only the values stand in: the row sum does not have it."""
    within = reading.value.within
    return None if within in [f.within for f in (reading.query, reading.key, reading.scores) if f is not None] else within


def _row_divisor(mirror: Mirror, number: Callable[[fx.Node], int], reading: Reading, divisor: Divisor) -> Divided | None:
    used = frozenset().union(*(expr.symbols(x) for x in divisor.index)) if divisor.index else frozenset()
    if {reading.j, reading.d, reading.e} & used:
        return None
    kinds: set[str] = set()
    sums: set[fx.Node] = set()

    def row_sum(node: fx.Node, index: Index) -> Expr | None:
        if not sums_of(node) or operation(node) == "aten.cumsum":
            return None
        found = _ratio(mirror, number, reading, node, index)
        if found is None:
            return None
        lifter.detached |= found[2]
        kinds.add(found[0])
        sums.add(node)
        mark = Load("row sum", (), torch.float32)
        return scale(mark, found[1])

    lifter = ScoreLifter(mirror, reading.extents.ranges, at=reading.output)
    lifter.hook, lifter.crossing = row_sum, True
    e = lifter.element(divisor.node, divisor.index)
    marks = [n for n in expr.walk(e) if isinstance(n, Load) and n.slot == "row sum"]
    if not marks or len(kinds) != 1:
        return None
    if any(
        isinstance(n, Load) and isinstance(n.slot, fx.Node) and {reading.j, reading.d, reading.e} & expr.symbols(n)
        for n in expr.walk(e)
    ):
        return None
    if lifter.detached and mirror.requires_grad(divisor.node):
        return None  # only a part of it is a constant to gradients
    if any(isinstance(n, Score) for n in expr.walk(e)):
        raise Refused("its divisor holds a score")
    return Divided(kinds.pop(), expr.rebuild(e, lambda n: Score() if n == marks[0] else None), lifter.detached, frozenset(sums))


def _ratio(
    mirror: Mirror, number: Callable[[fx.Node], int], reading: Reading, node: fx.Node, index: Index
) -> tuple[str, sympy.Expr, bool] | None:
    """``kind, r, detached`` where ``node`` is r times the sum of the row's weights (or of their magnitudes)."""
    product, detached = expanded(mirror, number, reading, node, index)
    kind = "sum"
    if len(product.factors) == 1 and operation(product.factors[0].node) == "aten.abs" and _magnitude(reading, number, product):
        kind = "abs_sum"
        inner = product.factors[0].node.args[0]
        assert isinstance(inner, fx.Node)
        within, inside = expanded(mirror, number, reading, inner, product.factors[0].index)
        detached |= inside
        product = Product(product.coefficient * within.coefficient, within.factors, within.divisors, product.sums + within.sums,
                          product.keeps + within.keeps)  # fmt: skip
        if len(within.sums) != (reading.scores is None):
            return None  # magnitudes of terms of a score, not of scores
    if product.divisors:
        return None
    wanted = _weights(reading, number)
    sums = [reading.j] if reading.scores is not None else [reading.j, reading.d]
    if len(product.sums) != len(sums):
        return None
    for order in permutations(sums):
        mapping = dict(zip(product.sums, order, strict=True))
        if _elements(product.factors, product.keeps, number, mapping) == wanted:
            ratio = sympy.cancel(product.coefficient / reading.product.coefficient)
            return kind, abs(ratio) if kind == "abs_sum" else ratio, detached
    return None


def _magnitude(reading: Reading, number: Callable[[fx.Node], int], product: Product) -> bool:
    factor = product.factors[0]
    return number(factor.node) not in {number(f.node) for f in reading.weights} and is_tensor(factor.node.args[0])


def _weights(reading: Reading, number: Callable[[fx.Node], int]) -> tuple[list[object], frozenset[Expr]]:
    return _elements(reading.weights, reading.product.keeps, number, {})


def _elements(
    factors: tuple[Factor, ...], keeps: tuple[Expr, ...], number: Callable[[fx.Node], int], mapping: dict[sympy.Symbol, sympy.Expr]
) -> tuple[list[object], frozenset[Expr]]:
    """What a product is made of, in a form that equal products share."""
    found = [(number(f.node), tuple(str(expr.substitute(x, mapping)) for x in f.index)) for f in factors]
    return sorted(found, key=str), frozenset(expr.substitute(k, mapping) for k in keeps)
