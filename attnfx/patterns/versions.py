"""Versions: the value of a tensor that was written in place, as the reader found it.

In-place operations are followed without rewriting the graph. The element of a tensor after a write is the element of what was
written where the write reached it, and the element before the write elsewhere. Where that cannot be said in a formula, the
tensor itself is data: :class:`Past` names it as it was after a given write; splicing takes a copy if a later write hides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Call, Const, Expr, Load
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.inverse import Place, placed
from attnfx.patterns.lift import Dot, Index, Lifter, Stale, operation

#: Beyond this many writes a tensor is loaded and not lifted.
_MOST_WRITES = 16
#: Operations that change the sizes of a tensor object and none of its elements.
_RESHAPING = tuple(f"aten.{name}_" for name in ("unsqueeze", "squeeze", "transpose", "t", "swapaxes", "swapdims", "as_strided"))
#: Operations that give a tensor object other memory.
_REPLACING = ("aten.resize_", "aten.resize_as_", "aten.set_")


@dataclass(frozen=True)
class Past:
    """The tensor ``node`` as it was after the write ``after`` (the node itself where nothing was written yet)."""

    node: fx.Node
    after: fx.Node

    @property
    def name(self) -> str:
        return self.node.name

    def requires_grad(self, mirror: Mirror) -> bool:
        """Whether autograd follows the tensor: it may have been given something differentiable."""
        known = mirror.writers(self.node, mirror.position[self.node], mirror.position[self.after] + 1)
        return any(mirror.requires_grad(n) for n in (self.node, *known))


def as_read(mirror: Mirror, node: fx.Node, reader: fx.Node) -> Past:
    """``node`` as ``reader`` finds it."""
    writers = mirror.writers(node, mirror.position[node] + 1, mirror.position[reader])
    return Past(node, writers[-1] if writers else node)


def hidden_by(mirror: Mirror, past: Past, until: fx.Node) -> fx.Node | None:
    """The first write after which ``past`` can no longer be read, if it comes before ``until``."""
    later = mirror.writers(past.node, mirror.position[past.after] + 1, mirror.position[until])
    return later[0] if later else None


def obtainable(mirror: Mirror, past: Past, until: fx.Node) -> bool:
    """Whether a graph node, or a copy of one taken in time, holds ``past`` for an attention in the place of ``until``."""
    node = past.node
    hidden = hidden_by(mirror, past, until)
    if not is_tensor(node):
        return True
    made = mirror.position[node]
    if any(operation(w) in (*_RESHAPING, *_REPLACING) for w in mirror.writers(node, made + 1, mirror.position[until])):
        return False
    if node in mirror.dynamo_of:
        if hidden is None:
            return True
        writer, holder = mirror.origin.get(hidden), mirror.holder(node)
        return writer is not None and mirror.origin.get(past.after) is not writer and holder < writer
    if node.name.startswith("opaque_"):
        return hidden is None
    return _recomputable(mirror, past, until)


def _recomputable(mirror: Mirror, past: Past, until: fx.Node) -> bool:
    """Whether a value inside another operation can be computed a second time."""
    node = past.node
    if mirror.writers(node, mirror.position[node], mirror.position[until]):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
            return False
    elif node.op != "call_function":
        return False
    return all(obtainable(mirror, as_read(mirror, n, node), until) for n in node.all_input_nodes)


def changed_between(mirror: Mirror, first: fx.Node, last: fx.Node) -> fx.Node | None:
    """A value on the way from ``first`` to ``last`` that something else than a step of the way writes in place; its readers on
    the way may then have read different things."""
    way, queue = {last}, [last]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in way and mirror.position[source] >= mirror.position[first]:
                way.add(source)
                queue.append(source)
    if first in last.all_input_nodes and len(way) == 2:
        return None  # one reader
    for node in sorted(way - {last}, key=lambda n: mirror.position[n]):
        if set(mirror.writers(node, mirror.position[node] + 1, mirror.position[last])) - way:
            return node
    return None


def element_as_read(lifter: Lifter, node: fx.Node, index: Index, writer: fx.Node) -> Expr:
    """Element ``index`` of ``node`` after its last write before the reader, ``writer``. Raises Stale where it is neither a
    formula nor a tensor."""
    mirror = lifter.mirror
    loaded = Load(Past(node, writer), index, node.meta["val"].dtype)
    held = obtainable(mirror, Past(node, writer), lifter.at)
    writes = mirror.writers(node, mirror.position[node] + 1, mirror.position[writer] + 1)
    try:
        if len(writes) > _MOST_WRITES:
            raise Stale(f"{node.name} is changed in place {len(writes)} times before it is read")
        found = _lifted(lifter, node, index, writer)
    except Stale:
        if held:
            return loaded
        raise
    if not held or any(isinstance(n, Load) and isinstance(n.slot, Dot) for n in expr.walk(found)):
        return found
    # A bias that learns is loaded: autograd then takes its gradient back through the edits.
    learns = mirror.requires_grad(lifter.at) and Past(node, writer).requires_grad(mirror)
    direct = hidden_by(mirror, Past(node, writer), lifter.at) is None
    return loaded if learns or (direct and lifter.worth_loading(found, index)) else found


def _lifted(lifter: Lifter, node: fx.Node, index: Index, writer: fx.Node) -> Expr:
    inside, at = _written_at(lifter, node, index, writer)
    if inside == expr.TRUE:
        return _new(lifter, node, at, writer)
    old = _before(lifter, node, index, writer)
    if inside == expr.FALSE:
        return old
    # Where the write reached, its target held what ``node`` held: said once, so that both sides name the same element.
    target: fx.Node = writer.args[0]  # type: ignore[assignment]
    earlier = as_read(lifter.mirror, target, writer).after
    memo, lifter.memo = lifter.memo, {(target, at, None if earlier is target else earlier): old}
    try:
        new = _new(lifter, node, at, writer)
    finally:
        lifter.memo = memo
    return merged(inside, new, old, node.meta["val"].dtype)


def _before(lifter: Lifter, node: fx.Node, index: Index, writer: fx.Node) -> Expr:
    reader, lifter.reader = lifter.reader, writer
    try:
        return lifter.element(node, index)
    finally:
        lifter.reader = reader


def _new(lifter: Lifter, node: fx.Node, at: Index, writer: fx.Node) -> Expr:
    found = lifter.element(writer, at)
    if isinstance(found, Load) and found.slot is writer and writer not in lifter.mirror.dynamo_of:
        raise Stale(f"{node.name} is changed in place by {writer.name}, which has no formula")
    return found


def _written_at(lifter: Lifter, node: fx.Node, index: Index, writer: fx.Node) -> Place:
    """Whether ``writer`` reaches element ``index`` of ``node``, and the index of that element in what it returns."""
    mirror = lifter.mirror
    if operation(writer) in _RESHAPING or _onto_itself(mirror, writer):
        return expr.FALSE, ()
    target = writer.args[0] if writer.args else None
    plain = is_tensor(writer) and is_tensor(target) and mirror.storage[writer] == mirror.storage.get(target)  # type: ignore[arg-type]
    if not plain or len(mirror.targets(writer)) != 1 or sizes(writer) != sizes(target) or lifter.severed(writer):  # type: ignore[arg-type]
        raise Stale(f"{node.name} is changed in place by {writer.name}, which cannot be followed")
    assert isinstance(target, fx.Node)
    ours, theirs = list(_views(mirror, node)), list(_views(mirror, target))
    common = next((n for n in ours if n in theirs), None)
    if common is None:
        raise Stale(f"{node.name} is changed in place by {writer.name} through memory that another tensor shares")
    at = index
    for view in ours[: ours.index(common)]:
        if not _keeps_place(mirror, view):
            step = lifter.moved(view, at)
            if step is None:
                raise Stale(f"{node.name} is changed in place by {writer.name}; the view {view.name} cannot be followed")
            at = step[1]
    inside: Expr = expr.TRUE
    for view in reversed(theirs[: theirs.index(common)]):
        if _keeps_place(mirror, view):
            continue
        found = None if lifter.severed(view) else placed(lifter, view, _parent(mirror, view), at)  # type: ignore[arg-type]
        if found is None:
            raise Stale(f"{node.name} is changed in place through the view {view.name}, which cannot be inverted")
        inside, at = expr.logical_and(inside, found[0]), found[1]
    return inside, tuple(expr.integer(0) if n == 1 else x for n, x in zip(sizes(target), at, strict=True))


def _onto_itself(mirror: Mirror, writer: fx.Node) -> bool:
    """Whether a copy gives every element its own value: ``x[part] += y`` ends in ``x[part] = x[part]``."""
    if operation(writer) != "aten.copy_":
        return False
    sides = [list(_views(mirror, n)) for n in writer.args[:2]]  # type: ignore[arg-type]
    common = next((n for n in sides[0] if n in sides[1]), None)
    if common is None:
        return False
    ways = [
        [(v.target, tuple(v.args[1:]), tuple(v.kwargs.items())) for v in side[: side.index(common)] if not _keeps_place(mirror, v)]
        for side in sides
    ]
    return ways[0] == ways[1]


def _views(mirror: Mirror, node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what it is a view of, newest first."""
    following: fx.Node | None = node
    while following is not None:
        yield following
        following = _parent(mirror, following)


def _parent(mirror: Mirror, node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and not is_tensor(source):
        source = source.args[0] if source.args else None
    same = isinstance(source, fx.Node) and is_tensor(source) and mirror.storage.get(source) == mirror.storage.get(node)
    return source if same else None  # type: ignore[return-value]


def _keeps_place(mirror: Mirror, node: fx.Node) -> bool:
    """Whether ``node`` is an in-place operation: it returns what it was given, with the same places."""
    if operation(node) in _RESHAPING or not mirror.targets(node):
        return False
    source = node.args[0] if node.args else None
    return source in mirror.targets(node) and sizes(node) == sizes(source)  # type: ignore[arg-type]


def merged(inside: Expr, new: Expr, old: Expr, dtype: torch.dtype) -> Expr:
    """``inside ? new : old``, with the condition where separation into bias and mask looks for it."""
    if dtype == torch.bool:
        for value, join, condition in (
            (new, {True: expr.logical_or, False: expr.logical_and}, inside),
            (old, {True: expr.logical_or, False: expr.logical_and}, expr.logical_not(inside)),
        ):
            if isinstance(value, Const):
                other = old if value is new else new
                return join[bool(value.value)](condition if value.value else expr.logical_not(condition), other)
    if isinstance(new, Call) and new.op == "where" and new.args[2] == old:
        return expr.where(expr.logical_and(inside, new.args[0]), new.args[1], old, dtype)
    scored = any(isinstance(n, Load) and isinstance(n.slot, Dot) for n in expr.walk(old))
    if scored and isinstance(new, Call) and new.op in _NEUTRAL and new.args[0] == old and new.dtype == dtype:
        changed, neutral = new.args[1], _NEUTRAL[new.op]
        amount = changed.dtype if changed.dtype.is_floating_point else dtype
        return Call(new.op, (old, expr.where(inside, expr.cast(changed, amount), expr.constant(neutral, amount), amount)), dtype)
    return expr.where(inside, new, old, dtype)


#: What changes no score: adding zero to one changes at most the sign of a zero, which no softmax sees.
_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}
