"""Lifting rules of reductions over a short axis, written out element by element, and of distances between points.

Sums of floats are written out only where no order of additions rounds: two terms, or integers that the type holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.separation import loads
from attnfx.expr import Call, Const, Expr, Int
from attnfx.graphs.mirror import is_tensor, sizes
from attnfx.patterns.contraction import _dot, _einsum, contraction
from attnfx.patterns.lift import Index, Lifter, operation, position_rule, rule, unpacking_rule
from attnfx.patterns.lift_choices import UNROLLED, static
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.lift_places import grid
from attnfx.patterns.lift_values import _dtype, _unwrapped
from attnfx.patterns.order import SHORT, free, is_free

#: Larger formulas stay data, those of two positions, which would be a tensor of their product, only above the second number.
NODES, NODES_OF_PAIRS = 64, 512
#: Integers up to here are products of TF32 without rounding.
COORDINATE = 1 << 10


def _terms(lifter: Lifter, node: fx.Node, index: Index, dims: Any, keep: bool) -> list[Expr] | None:
    """The elements that one element of the reduction ``node`` is made of."""
    source = node.args[0]
    if not is_tensor(source):
        return None
    shape = sizes(source)  # type: ignore[arg-type]
    rank = len(shape)
    asked = list(dims) if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    axes = sorted({int(d) % max(rank, 1) for d in asked}) if asked else list(range(rank))
    counts = [static(shape[d]) for d in axes]
    if any(n is None for n in counts) or math.prod(n or 0 for n in counts) > UNROLLED:
        return None
    found = []
    for places in itertools.product(*(range(n or 0) for n in counts)):
        at: list[Expr] = []
        rest = iter(x for d, x in enumerate(index) if not (keep and d in axes))
        for d in range(rank):
            at.append(expr.integer(places[axes.index(d)]) if d in axes else next(rest))
        found.append(lifter.element(source, tuple(at)))
    return found


def _small(lifter: Lifter, found: Expr, index: Index) -> Expr | None:
    """``found`` where it is worth its length, and reads no more than vectors of data."""
    used = frozenset().union(*map(expr.symbols, index)) if index else frozenset()
    read = loads(found)
    if read and (lifter.inner is None or any(all(s in expr.symbols(n) for s in lifter.inner) for n in read)):
        return None
    pairs = lifter.inner is not None and all(s in used for s in lifter.inner)
    if read and not pairs:
        return None
    limit = NODES_OF_PAIRS if pairs or len(used) > 1 else NODES
    return found if sum(1 for _ in expr.walk(found)) <= limit else None


def largest(lifter: Lifter, e: Expr) -> float:
    """A bound of |``e``| where it is proved to be a whole number that no step on the way rounds; infinity elsewhere."""
    match e:
        case Int():
            low, high = lifter.ranges.minimum(e.value), lifter.ranges.maximum(e.value)
            return math.inf if low is None or high is None else float(max(abs(int(low)), abs(int(high))))
        case Const():
            value = float(e.value)
            return abs(value) if value.is_integer() else math.inf
        case Call():
            return _exactly(lifter, e)
    return math.inf


def _exactly(lifter: Lifter, e: Call) -> float:
    if e.dtype == torch.bool:
        return 1.0
    parts = [largest(lifter, a) for a in e.args[e.op == "where" :]]
    makers: dict[str, Callable[[], float]] = {
        "add": lambda: sum(parts), "sub": lambda: sum(parts), "mul": lambda: math.inf if math.inf in parts else math.prod(parts),
        "cast": lambda: parts[0], "neg": lambda: parts[0], "abs": lambda: parts[0], "where": lambda: max(parts),
        "min": lambda: max(parts), "max": lambda: max(parts), "pow": lambda: _raised(parts[0], e.args[1]),
    }  # fmt: skip
    most = makers[e.op]() if e.op in makers else math.inf
    return most if not e.dtype.is_floating_point or most <= held(e.dtype) else math.inf


def _raised(base: float, exponent: Expr) -> float:
    power = exponent.value if isinstance(exponent, Const | Int) else None
    return base ** int(power) if power in (1, 2, 3, 4) and base < math.inf else math.inf


def held(dtype: torch.dtype) -> float:
    """Integers up to here are exact in the float type ``dtype``."""
    return 2.0 ** (1 - round(math.log2(torch.finfo(dtype).eps)))


def total(lifter: Lifter, terms: Sequence[Expr], dtype: torch.dtype) -> Expr | None:
    """The sum of ``terms`` in ``dtype``; None where its rounding would depend on the order, and more than a few are added."""
    ordered = dtype.is_floating_point and len(terms) > 2 and sum(largest(lifter, t) for t in terms) > held(dtype)
    if dtype == torch.bool or (ordered and (lifter.ordered or len(terms) > SHORT)):
        return None
    wide = torch.float32 if ordered and dtype.itemsize < 4 else dtype  # torch rounds such a sum to a half once
    found = _typed(_typed(terms[0], dtype), wide)
    for term in terms[1:]:
        found = expr.add(found, _typed(_typed(term, dtype), wide), wide)
    return free(expr.cast(found, dtype)) if ordered else found


def _typed(e: Expr, dtype: torch.dtype) -> Expr:
    return e if isinstance(e, Int) and not dtype.is_floating_point else expr.cast(e, dtype)


def _same_type(node: fx.Node) -> bool:
    """Whether a reduction of floats is done in the type of its operand."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    given: torch.dtype = source.meta["val"].dtype
    return given == _dtype(node) or not given.is_floating_point


def _dims(node: fx.Node, place: int = 1) -> tuple[Any, bool]:
    return argument(node, place, "dim"), bool(argument(node, place + 1, "keepdim", False))


@rule("aten.sum")
def _sum_or_product(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return _contracted(lifter, node, index) if contraction(node) is not None else _reduced(lifter, node, index)


@rule("aten.matmul", "aten.bmm", "aten.einsum")
def _contracted(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """A product of short vectors that are made of positions, one-hot rows for example, or of coordinates beside the scores is
    written out."""
    return _written_out(lifter, node, index) or (_einsum if operation(node) == "aten.einsum" else _dot)(lifter, node, index)


@_unwrapped
def _written_out(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    made = contraction(node)
    width = None if made is None else static(made.summed)
    if made is None or width is None or lifter.mirror.requires_grad(node):
        return None
    dtype = _dtype(node)
    pairs = [[made.element(side, lifter, index, expr.integer(k)) for side in (0, 1)] for k in range(width)]
    whole = all(largest(lifter, x) <= COORDINATE and not loads(x) for pair in pairs for x in pair)
    if not whole and not _coordinates(lifter, node, pairs):
        return None
    wide = dtype if whole or dtype.itemsize >= 4 else torch.float32
    terms = [expr.mul(_typed(_typed(x, dtype), wide), _typed(_typed(y, dtype), wide), wide) for x, y in pairs]
    found = total(lifter, terms, wide)
    if found is None:
        return None
    return _small(lifter, found if whole else free(expr.cast(found, dtype), cancels=True), index)


def _coordinates(lifter: Lifter, node: fx.Node, pairs: Sequence[Sequence[Expr]]) -> bool:
    """Whether ``node`` multiplies vectors of few coordinates, and is known not to make the scores."""
    known = not lifter.ordered and lifter.learned is not None and node not in lifter.learned.scores
    few = len(pairs) <= SHORT and _dtype(node).is_floating_point
    return known and few and not any(lifter.followed(n) for pair in pairs for x in pair for n in loads(x))


@position_rule("aten.mean")
@_unwrapped
def _reduced(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    terms = _terms(lifter, node, index, *_dims(node))
    if terms is None or not _same_type(node):
        return None
    found = total(lifter, terms, _dtype(node))
    if found is None or operation(node) == "aten.sum":
        return found and _small(lifter, found, index)
    mean = expr.div(found, expr.constant(float(len(terms)), _dtype(node)), _dtype(node))
    if len(terms) & (len(terms) - 1):  # a mean is a product or a quotient, by device
        return _small(lifter, free(mean), index) if is_free(found) else None
    return _small(lifter, mean, index)


@position_rule("aten.prod")
@_unwrapped
def _product(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    terms = _terms(lifter, node, index, *_dims(node))
    if terms is None or not _same_type(node) or (_dtype(node).is_floating_point and len(terms) > 2):
        return None
    found = _typed(terms[0], _dtype(node))
    for term in terms[1:]:
        found = expr.mul(found, _typed(term, _dtype(node)), _dtype(node))
    return _small(lifter, found, index)


@position_rule("aten.amax", "aten.amin")
def _extremum(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    terms = _terms(lifter, node, index, *_dims(node))
    return None if terms is None else extreme(lifter, terms, "max" in operation(node), _dtype(node), index)


def extreme(lifter: Lifter, terms: Sequence[Expr], largest_: bool, dtype: torch.dtype, index: Index) -> Expr | None:
    found = terms[0]
    if dtype == torch.bool:
        found = (expr.logical_or if largest_ else expr.logical_and)(*terms)
    for term in terms[1:] if dtype != torch.bool else ():
        found = (expr.maximum if largest_ else expr.minimum)(found, term, dtype)
    return _small(lifter, found, index)


@position_rule("aten.all", "aten.any", "aten.count_nonzero")
def _logical(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    terms = _terms(lifter, node, index, *_dims(node))
    if terms is None or _dtype(node) == torch.uint8:
        return None
    conditions = [expr.cast(t, torch.bool) for t in terms]
    if operation(node) == "aten.count_nonzero":
        found = total(lifter, conditions, torch.int64)
        return found and _small(lifter, found, index)
    return _small(lifter, (expr.logical_and if operation(node) == "aten.all" else expr.logical_or)(*conditions), index)


def length(lifter: Lifter, terms: Sequence[Expr], order: float, dtype: torch.dtype) -> Expr | None:
    """The norm of a vector, of a few numbers where sums of powers are not exact, in an order that needs no root else."""
    terms = [expr.cast(t, dtype) for t in terms]
    absolute = [expr.call("abs", t, dtype=dtype) for t in terms]
    if order == math.inf:
        found = absolute[0]
        for term in absolute[1:]:
            found = expr.maximum(found, term, dtype)
        return found
    if order == 1:
        return total(lifter, absolute, dtype)
    squares = [expr.mul(t, t, dtype) for t in terms]
    found_sum = total(lifter, squares, dtype) if order == 2 and dtype.itemsize >= 4 else None
    if found_sum is None:
        return None
    if dtype != torch.float32 or sum(largest(lifter, s) for s in squares) > held(dtype):
        few = len(terms) <= SHORT and not lifter.ordered
        return free(expr.call("sqrt", found_sum, dtype=dtype)) if few else None
    # a norm's root is rounded correctly, which the root of a whole tensor is not on every CPU
    return expr.cast(expr.call("sqrt", expr.cast(found_sum, torch.float64), dtype=torch.float64), dtype)


@position_rule("aten.linalg_vector_norm", "aten.linalg_norm", "aten.norm")
def _norm(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    order = argument(node, 1, "p" if operation(node) == "aten.norm" else "ord")
    dims, keep = _dims(node, 2)
    order = 2 if order is None else order
    one = isinstance(dims, int) or (isinstance(dims, list | tuple) and len(dims) == 1)
    if not isinstance(order, int | float) or not one or _dtype(node).itemsize < 4 or not _same_type(node):
        return None
    terms = _terms(lifter, node, index, dims, keep)
    found = None if terms is None else length(lifter, terms, float(order), _dtype(node))
    return found and _small(lifter, found, index)


@position_rule("aten.cdist")
def _distance(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Of points, long lists of which are compared by a product that loses small distances unless coordinates are small integers."""
    left, right = node.args[:2]
    order = float(argument(node, 2, "p", 2.0))
    width = static(sizes(left)[-1])  # type: ignore[arg-type]
    if width is None or not is_tensor(left) or not is_tensor(right):
        return None
    dtype, leading = _dtype(node), index[:-2]
    differences, whole = [], True
    for k in range(width):
        x, y = (
            lifter.broadcast(t, (*leading, at, expr.integer(k))) for t, at in ((left, index[-2]), (right, index[-1]))
        )  # fmt: skip
        differences.append(expr.sub(x, y, dtype))
        whole = whole and max(largest(lifter, x), largest(lifter, y)) <= COORDINATE
    found = length(lifter, differences, order, dtype) if whole or order != 2 or width <= SHORT else None
    cancels = order == 2 and not whole and _compared_by_product(node)
    return found and _small(lifter, free(found, cancels=True) if cancels else found, index)


def _compared_by_product(node: fx.Node) -> bool:
    mode = argument(node, 3, "compute_mode", 0) or 0
    short = all(n.is_Integer and n <= 25 for n in (sizes(x)[-2] for x in node.args[:2]))  # type: ignore[arg-type]
    return bool(mode == 1 or (mode == 0 and not short))


@unpacking_rule("aten.meshgrid")
def _mesh(lifter: Lifter, source: fx.Node, which: int, index: Index) -> Expr | None:
    return grid(lifter, source, which, index)


@unpacking_rule("aten.broadcast_tensors")
def _broadcast(lifter: Lifter, source: fx.Node, which: int, index: Index) -> Expr | None:
    operands = source.args[0]
    assert isinstance(operands, list | tuple)
    return lifter.broadcast(operands[which], index)


@unpacking_rule("aten.max", "aten.min")
def _best(lifter: Lifter, source: fx.Node, which: int, index: Index) -> Expr | None:
    if which != 0 or len(source.args) < 2:
        return None
    terms = _terms(lifter, source, index, *_dims(source))
    return None if terms is None else extreme(lifter, terms, "max" in operation(source), source.meta["val"][0].dtype, index)
