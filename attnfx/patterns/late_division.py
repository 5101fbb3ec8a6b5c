"""Softmax with the division last: ``(exp(z - m) v) / sum_j exp(z - m)``, as hand-written and online forms spell it."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from torch import fx

from attnfx.expr import Expr, Int, Load
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.axes import Extents
from attnfx.patterns.candidate import Candidate
from attnfx.patterns.contraction import Contraction, contraction
from attnfx.patterns.lift import Index, Lifter, operation
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.softmax import unshifted


def find(mirror: Mirror) -> Iterator[Candidate | tuple[fx.Node, str]]:
    """Every quotient of a product with exponentials and the sum of the same exponentials over the summed axis."""
    for node in mirror.graph.nodes:
        if operation(node) in ("aten.div", "aten.div_") and len(node.args) == 2 and all(map(is_tensor, node.args)):
            found = _quotient(mirror, node)
            if found is not None:
                yield found


def _quotient(mirror: Mirror, node: fx.Node) -> Candidate | None:
    numerator, total = node.args
    assert isinstance(numerator, fx.Node)
    symbols = tuple(sympy.Symbol(f"o{k}", integer=True, nonnegative=True) for k in range(len(sizes(node))))
    extents = Extents(dict(zip(symbols, sizes(node), strict=True)), mirror.ranges)
    lifter = Lifter(mirror, extents.ranges, at=node)
    index: Index = tuple(map(Int, symbols))
    if sizes(numerator) != sizes(node):
        return None
    end, at = _origin(lifter, numerator, index)
    product = contraction(end)
    summed = lifter.broadcast(total, index) if product is not None else None
    if product is None or not isinstance(summed, Load) or not isinstance(summed.slot, fx.Node):
        return None
    exponentials, axis = _summand(summed.slot)
    if exponentials is None:
        return None
    t = Int(sympy.Symbol("t", integer=True, nonnegative=True))
    sides = [n for n in (0, 1) if _read(product, n, lifter, at, t, exponentials) is not None]
    if len(sides) != 1:
        return None
    weights = _read(product, sides[0], lifter, at, t, exponentials)
    assert weights is not None
    kept = len(summed.indices) == len(weights.indices)
    rest = summed.indices[:axis] + summed.indices[axis + 1 :] if kept else summed.indices
    if weights.indices[axis] != t or weights.indices[:axis] + weights.indices[axis + 1 :] != rest:
        return None
    return _candidate(mirror, node, numerator, product, sides[0], exponentials, axis)


def _origin(lifter: Lifter, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """``node`` at ``index`` before the operations that only moved elements."""
    while contraction(node) is None and (step := lifter.moved(node, index)) is not None:
        node, index = step
    return node, index


def _summand(node: fx.Node) -> tuple[fx.Node | None, int]:
    """``e, axis`` where ``node`` sums exponentials ``e`` over one axis."""
    source = node.args[0] if node.args else None
    dims = argument(node, 1, "dim")
    if operation(node) != "aten.sum" or not isinstance(source, fx.Node) or operation(source) != "aten.exp":
        return None, 0
    return (source, int(dims[0]) % len(sizes(source))) if dims is not None and len(dims) == 1 else (None, 0)


def _read(product: Contraction, side: int, lifter: Lifter, at: Index, t: Expr, exponentials: fx.Node) -> Load | None:
    onwards = Lifter(lifter.mirror, lifter.ranges, at=product.node, stop=exponentials)
    found = product.element(side, onwards, at, t)
    return found if isinstance(found, Load) and found.slot is exponentials else None


def _candidate(
    mirror: Mirror, node: fx.Node, numerator: fx.Node, product: Contraction, side: int, exponentials: fx.Node, axis: int
) -> Candidate:
    shifted = exponentials.args[0]
    assert isinstance(shifted, fx.Node)
    logits = unshifted(shifted, axis)

    def probabilities(lifter: Lifter, index: Index, t: Expr) -> Expr:
        return product.element(side, lifter, _origin(lifter, numerator, index)[1], t)

    def values(lifter: Lifter, index: Index, t: Expr) -> tuple[fx.Node, Index]:
        return product.sides(_origin(lifter, numerator, index)[1], t)[1 - side]

    readers = [u.name for u in exponentials.users if u is not product.node and operation(u) != "aten.sum" and mirror.live(u)]
    return Candidate(
        pattern="softmax",
        normaliser=exponentials,
        output=node,
        axis=axis,
        length=sizes(exponentials)[axis],
        summed=product.summed,
        logits=lambda lifter, index: lifter.broadcast(logits, index),
        probabilities=probabilities,
        values=values,
        empty_rows="nan" if logits is not shifted else "underflow",
        consumed=frozenset([exponentials, product.node, node]),
        also=next(iter(readers), ""),
    )
