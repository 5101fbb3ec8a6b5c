"""Softmax chains written out: logits, a softmax in any spelling, perhaps a cast and dropout, and a contraction with the values."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from torch import fx

from attnfx import expr
from attnfx.capture import Mirror, is_tensor, sizes
from attnfx.expr import Expr
from attnfx.patterns.candidate import Candidate
from attnfx.patterns.contraction import Contraction, contraction
from attnfx.patterns.lift import _MOVES, Index, Lifter, operation
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.versions import changed_between

_CASTS = ("aten.to", "aten._to_copy", "aten.type_as")
_DROPOUT = ("aten.dropout", "aten.dropout_", "aten.native_dropout")


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
        return source, int(argument(node, 1, "dim")) % max(len(sizes(source)), 1)
    if operation(node) == "aten.div" and len(node.args) == 2 and all(is_tensor(a) for a in node.args):
        return _written_out(*node.args)  # type: ignore[arg-type]
    return None


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
    return (source, axis) if isinstance(source, fx.Node) and _row_maximum(top, source, axis, rank) else (shifted, axis)


def _row_maximum(top: object, source: fx.Node, axis: int, rank: int) -> bool:
    while isinstance(top, fx.Node) and operation(top) in ("aten.detach", "_operator.getitem"):
        top = top.args[0]
    if (
        not isinstance(top, fx.Node)
        or operation(top) not in ("aten.amax", "aten.max", "aten.logsumexp")
        or top.args[0] is not source
    ):
        return False
    dims = argument(top, 1, "dim")
    given = [dims] if isinstance(dims, int) else list(dims or ())
    return [int(d) % rank for d in given] == [axis] and bool(argument(top, 2, "keepdim", False))


def _continued(mirror: Mirror, node: fx.Node, logits: fx.Node, axis: int) -> Iterator[Candidate | tuple[fx.Node, str]]:
    ends, path, dropout = _forward(node)
    if len(ends) != 1:
        if ends:
            yield node, f"its probabilities are contracted {len(ends)} times"
        return
    end = ends[0]
    leaves = [user.name for step in path for user in step.users if user is not end and user not in path and mirror.live(user)]
    leaves += [s.name for s in path if mirror.targets(s) and mirror.position[s] > mirror.position[end]]
    leaves += ["the caller, as an output of the model" for step in path if mirror.leaves_graph(step)]
    if leaves:
        yield node, f"its probabilities are also used by {leaves[0]}"
        return
    if mirror.requires_grad(end) and any(map(mirror.severed, path)):
        yield node, "its probabilities are detached from the graph of gradients"
        return
    multiplied = contraction(end)
    assert multiplied is not None
    if sympy.expand(multiplied.summed - sizes(logits)[axis]) != 0:
        yield node, f"{multiplied.summed} of its {sizes(logits)[axis]} probabilities are summed"
        return
    on_left = multiplied.left in path
    if on_left == (multiplied.right in path):
        yield node, "its probabilities are multiplied by themselves"
        return
    yield _candidate(node, logits, axis, multiplied, on_left, frozenset(path), dropout)


def _cast(node: fx.Node) -> bool:
    """Whether a node converts probabilities to a type that still holds probabilities."""
    if operation(node) not in _CASTS:
        return False
    dtype = node.meta["val"].dtype
    return bool(dtype.is_floating_point and dtype.itemsize >= 2)


def _forward(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node], float]:
    """The contractions that the weights reach, the nodes on the way, and the dropout met there."""
    path, ends, dropout, queue = [node], [], 0.0, [node]
    while queue:
        for user in queue.pop().users:
            if user in path or user in ends:
                continue
            if contraction(user) is not None:
                ends.append(user)
            elif operation(user) in _MOVES or _cast(user) or operation(user) in _DROPOUT:
                path.append(user)
                queue.append(user)
                if operation(user) in _DROPOUT and argument(user, 2, "train", False):
                    dropout = 1 - (1 - dropout) * (1 - float(argument(user, 1, "p")))
    return ends, path, dropout


def _candidate(
    node: fx.Node, logits: fx.Node, axis: int, end: Contraction, on_left: bool, path: frozenset[fx.Node], dropout: float
) -> Candidate:
    def weights(lifter: Lifter, index: Index, t: Expr) -> Index:
        at, place = end.sides(index, t)[0 if on_left else 1]
        while at is not node:
            if operation(at) in _CASTS or operation(at) in _DROPOUT:
                at = at.args[0]  # type: ignore[assignment]
            else:
                step = lifter.moved(at, place)
                assert step is not None
                at, place = step
        return place

    return Candidate(
        pattern="softmax",
        normaliser=node,
        output=end.node,
        axis=axis,
        logits=lambda lifter, index: lifter.broadcast(logits, index) if is_tensor(logits) else expr.lift(0),
        weights=weights,
        values=lambda index, t: end.sides(index, t)[1 if on_left else 0],
        empty_rows=_empty_rows(node, logits),
        dropout=dropout,
        consumed=path | {end.node},
    )
