"""Softmax chains written out: logits, a softmax in any spelling, perhaps a cast and dropout, and a contraction with the values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.candidate import Candidate
from attnfx.patterns.contraction import Contraction, contraction
from attnfx.patterns.lift import operation
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.probabilities import Course, beside, course
from attnfx.patterns.versions import changed_between


def find(mirror: Mirror) -> Iterator[Candidate | tuple[fx.Node, str]]:
    """Every softmax whose weights are contracted with something over the normalised axis."""
    for node in mirror.graph.nodes:
        if (found := logits_of(node)) is not None:
            if (changed := changed_between(mirror, found[0], node)) is not None:
                yield node, f"{changed.name} is changed in place while its softmax is computed"
            else:
                yield from _continued(mirror, node, *found)


def _empty_rows(node: fx.Node, logits: fx.Node) -> str:
    """What a query without keys gives; an exp without the row maximum taken off underflows to 0 / 0 for any low fill."""
    numerator = node.args[0]
    assert isinstance(numerator, fx.Node)
    return "underflow" if operation(node) == "aten.div" and numerator.args[0] is logits else "nan"


def logits_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``logits, axis`` where ``node`` is their softmax, in one operation or written out as exp, sum and division."""
    if operation(node) in ("aten.softmax", "aten._softmax", "aten.special_softmax"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = int(argument(node, 1, "dim")) % max(len(sizes(source)), 1)
        return unshifted(source, axis), axis
    if operation(node) == "aten.div" and len(node.args) == 2 and all(is_tensor(a) for a in node.args):
        return _written_out(*node.args)  # type: ignore[arg-type]
    if operation(node) == "aten.exp":
        return _of_logarithm(node.args[0])  # type: ignore[arg-type]
    return None


def _of_logarithm(source: fx.Node) -> tuple[fx.Node, int] | None:
    """exp(log_softmax(x)) or exp(x - logsumexp(x))."""
    if operation(source) in ("aten.log_softmax", "aten._log_softmax"):
        logits = source.args[0]
        assert isinstance(logits, fx.Node)
        return logits, int(argument(source, 1, "dim")) % max(len(sizes(logits)), 1)
    if operation(source) == "aten.sub" and source.kwargs.get("alpha", 1) == 1:
        logits, total = source.args[:2]
        for axis in range(len(sizes(source))):
            if isinstance(logits, fx.Node) and row_value(total, logits, axis, ("aten.logsumexp",)):
                return logits, axis
    return None


def unshifted(source: fx.Node, axis: int) -> fx.Node:
    """``source`` before its own row maximum was taken off, which a softmax does not see."""
    while operation(source) in ("aten.sub", "aten.sub_") and source.kwargs.get("alpha", 1) == 1:
        older, top = source.args[:2]
        if not (isinstance(older, fx.Node) and _row_maximum(top, older, axis)):
            break
        source = older
    return source


def _written_out(weights: fx.Node, total: fx.Node) -> tuple[fx.Node, int] | None:
    """exp(x - m) / sum(exp(x - m)) for a row maximum m (or with no maximum taken)."""
    if operation(weights) != "aten.exp" or operation(total) != "aten.sum" or total.args[0] is not weights:
        return None
    dims, kept = argument(total, 1, "dim"), argument(total, 2, "keepdim", False)
    if not kept or dims is None or len(dims) != 1:
        return None
    rank = len(sizes(weights))
    axis = int(dims[0]) % rank
    shifted = weights.args[0]
    assert isinstance(shifted, fx.Node)
    if operation(shifted) != "aten.sub":
        return shifted, axis
    source, top = shifted.args[:2]
    return (source, axis) if isinstance(source, fx.Node) and _row_maximum(top, source, axis) else (shifted, axis)


def _row_maximum(top: object, source: fx.Node, axis: int) -> bool:
    """Whether ``top`` is the maximum of ``source`` along ``axis``, or another number near it that a softmax may take off."""
    return row_value(top, source, axis, ("aten.amax", "aten.max", "aten.logsumexp"))


def row_value(top: object, source: fx.Node, axis: int, names: tuple[str, ...]) -> bool:
    """Whether ``top`` is what one of the operations ``names`` gives for ``source`` along ``axis``, as an axis of size one."""
    rank, kept = len(sizes(source)), False
    while isinstance(top, fx.Node) and operation(top) in ("aten.detach", "_operator.getitem", "aten.unsqueeze"):
        if operation(top) == "aten.unsqueeze":
            kept = int(argument(top, 1, "dim")) % rank == axis
        top = top.args[0]
    if not isinstance(top, fx.Node) or operation(top) not in names or _attached(top.args[0]) is not source:
        return False
    dims = argument(top, 1, "dim")
    given = [dims] if isinstance(dims, int) else list(dims or ())
    return [int(d) % rank for d in given] == [axis] and kept != bool(argument(top, 2, "keepdim", False))


def _attached(source: object) -> object:
    while isinstance(source, fx.Node) and operation(source) == "aten.detach":
        source = source.args[0]
    return source


def _continued(mirror: Mirror, node: fx.Node, logits: fx.Node, axis: int) -> Iterator[Candidate | tuple[fx.Node, str]]:
    way = course(mirror, node)
    if not way.ends:
        return
    if way.leaves and way.dropout:
        yield node, f"its dropped probabilities are also used by {way.leaves[0]}"
        return
    if len(way.ends) > 1 and way.dropout:
        yield node, f"its dropped probabilities are contracted {len(way.ends)} times"
        return
    for end in way.ends:
        if mirror.requires_grad(end) and any(mirror.severed(n) for n in way.path if not beside(n)):
            yield node, "its probabilities are detached from the graph of gradients"
            return
    for end in way.ends:
        multiplied = contraction(end)
        assert multiplied is not None
        if (multiplied.left in way.path) == (multiplied.right in way.path):
            yield node, "its probabilities are multiplied by themselves"
            return
        yield _candidate(node, logits, axis, multiplied, way)


def _entering(node: fx.Node, logits: Expr) -> Expr:
    """``logits`` as ``softmax(logits, dtype=...)`` takes them: a narrower type has no room for a fill of a wider one."""
    dtype: torch.dtype = node.meta["val"].dtype
    narrower = dtype.is_floating_point and logits.dtype.is_floating_point and dtype.itemsize < logits.dtype.itemsize
    return expr.cast(logits, dtype) if narrower else logits


def _candidate(node: fx.Node, logits: fx.Node, axis: int, end: Contraction, way: Course) -> Candidate:
    side = 0 if end.left in way.path else 1
    return Candidate(
        pattern="softmax",
        normaliser=node,
        output=end.node,
        axis=axis,
        length=sizes(logits)[axis],
        summed=end.summed,
        logits=lambda lifter, index: _entering(node, lifter.broadcast(logits, index)) if is_tensor(logits) else expr.lift(0),
        probabilities=lambda lifter, index, t: end.element(side, lifter, index, t),
        values=lambda lifter, index, t: end.sides(index, t)[1 - side],
        empty_rows=_empty_rows(node, logits),
        dropout=way.dropout,
        consumed=way.path | {end.node},
        also=next(iter(way.leaves), ""),
    )
