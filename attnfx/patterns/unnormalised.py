"""Exponentials that nothing divides yet: ``exp(z - max z) v`` and ``sum_j exp(z - max z)``, which the model joins with others.

Hierarchical and chunked attentions are sums of such pieces, divided once in the end. The row sum, and the row maximum where the
model reads it, are results of the attention beside the product.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from attnfx.graphs.mirror import Mirror, descends, sizes
from attnfx.patterns.candidate import Candidate
from attnfx.patterns.contraction import contraction
from attnfx.patterns.lift import operation
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.probabilities import beside, course
from attnfx.patterns.softmax import row_value
from attnfx.patterns.versions import changed_between


def find(mirror: Mirror) -> Iterator[Candidate | tuple[fx.Node, str]]:
    """Every exponential of scores less their row maximum that is summed over the keys, and contracted with something over them."""
    for node in mirror.graph.nodes:
        if operation(node) != "aten.exp" or (shift := _shifted(node)) is None:
            continue
        logits, top, axis = shift
        if sums := [n for same in _same(node) for n in same.users if _sums(n, axis) and mirror.live(n)]:
            found = _continued(mirror, node, logits, top, axis, sums)
            if found is not None:
                yield found


def _shifted(node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """``z, m, axis`` where ``node`` is exp(z - m) and m is the maximum of z along the axis, kept as an axis of size one."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or operation(source) != "aten.sub" or source.kwargs.get("alpha", 1) != 1:
        return None
    logits, top = source.args[:2]
    if not isinstance(logits, fx.Node) or not isinstance(top, fx.Node):
        return None
    for axis in range(len(sizes(node))):
        if row_value(top, logits, axis, ("aten.amax", "aten.max")):
            return logits, top, axis
    return None


def _same(node: fx.Node) -> list[fx.Node]:
    """``node`` and what has its values: copies, and dropouts that drop nothing."""
    found = [node]
    for n in found:
        for user in n.users:
            idle = operation(user) == "aten.dropout" and not (argument(user, 2, "train", False) and argument(user, 1, "p"))
            if idle or operation(user) in ("aten.alias", "aten.clone", "aten.contiguous"):
                found.append(user)
    return found


def _sums(node: fx.Node, axis: int) -> bool:
    if operation(node) != "aten.sum" or node.kwargs.get("dtype") is not None:
        return False
    dims = argument(node, 1, "dim")
    rank = len(sizes(node.args[0]))  # type: ignore[arg-type]
    return dims is not None and [int(d) % rank for d in dims] == [axis]


def _continued(
    mirror: Mirror, node: fx.Node, logits: fx.Node, top: fx.Node, axis: int, sums: list[fx.Node]
) -> Candidate | tuple[fx.Node, str] | None:
    way = course(mirror, node, sums)
    beyond = [n for step in way.path - {node} for n in step.all_input_nodes if n not in way.path]
    if len(way.ends) != 1 or any(descends(n, node) for n in beyond):
        return None  # divided by their own sum, or several products of which only one could give the row sums
    end, made = way.ends[0], contraction(way.ends[0])
    assert made is not None
    if (made.left in way.path) == (made.right in way.path):
        return None
    if (changed := changed_between(mirror, logits, node)) is not None:
        return node, f"{changed.name} is changed in place while its exponentials are computed"
    if mirror.requires_grad(top):
        return node, "no sum divides its exponentials, and their gradient in the row maximum, which is not detached, has no kernel"
    if mirror.requires_grad(end) and any(mirror.severed(n) for n in way.path if not beside(n)):
        return node, "its exponentials are detached from the graph of gradients"
    side = 0 if made.left in way.path else 1
    sources = _sources(top)
    rows, read = [("sum", n) for n in sums], [n for row in sums for n in row.users]
    for maximum in sources:
        away = [n for n in maximum.users if n not in sources and operation(n) != "aten.sub" and mirror.live(n)]
        if away or mirror.leaves_graph(maximum):
            if mirror.requires_grad(maximum):
                return node, f"the gradient of the row maximum of its scores ({maximum.name}) has no kernel"
            if mirror.writers(maximum, 0):
                return node, f"the row maximum of its scores ({maximum.name}) is changed in place"
            rows.append(("max", maximum))
            read += away
    first = min((n for n in read if mirror.position[n] < mirror.position[end]), key=lambda n: mirror.position[n], default=None)
    if first is not None:
        # the attention has to stand there, with all that it reads
        at, until = mirror.position[first], mirror.position[end]
        if mirror.position[made.right if side == 0 else made.left] > at or any(at <= w < until for w, _ in mirror.mutations):
            return node, f"its row sum or maximum is read by {first.name} before the values are known"
    others = [name for name in way.leaves if name not in {n.name for n in sums}]
    if way.dropout and others:
        return node, f"its dropped exponentials are also used by {others[0]}"
    return Candidate(
        pattern="unnormalised softmax",
        normaliser=node,
        output=end,
        axis=axis,
        length=sizes(logits)[axis],
        summed=made.summed,
        logits=lambda lifter, index: lifter.broadcast(logits, index),
        probabilities=lambda lifter, index, t: made.element(side, lifter, index, t),
        values=lambda lifter, index, t: made.sides(index, t)[1 - side],
        empty_rows="nan",
        dropout=way.dropout,
        consumed=way.path | {end},
        also=next(iter(others), ""),
        rows=tuple(rows),
        first=first,
    )


def _sources(top: fx.Node) -> list[fx.Node]:
    """``top`` and what it was before it was detached and given its axis back: in the end the maximum itself."""
    chain = [top]
    while operation(chain[-1]) in ("aten.detach", "aten.unsqueeze"):
        assert isinstance(chain[-1].args[0], fx.Node)
        chain.append(chain[-1].args[0])
    return chain
