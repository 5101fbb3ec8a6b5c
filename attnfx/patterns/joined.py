"""Pieces joined before one softmax: ``softmax([z1, z2, ..])``, whose parts multiply values of their own, and their sum.

Sparse attention is spelled so (BigBird, arXiv:2007.14062): sliding, random and global keys have scores and values of their own.
Laid side by side along the keys they are one attention; its logits are a formula that tells the pieces apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sympy
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.axes import Extents
from attnfx.patterns.candidate import Candidate
from attnfx.patterns.contraction import contraction
from attnfx.patterns.hoisted import hoisted
from attnfx.patterns.laid_together import Piece, Share, one_product, one_value
from attnfx.patterns.lift import Dot, Index, Lifter, Stale, has_rule, operation
from attnfx.patterns.probabilities import Course, beside, course
from attnfx.patterns.softmax import logits_of
from attnfx.patterns.versions import changed_between

_T = sympy.Symbol("t", integer=True, nonnegative=True)


def find(mirror: Mirror) -> Iterator[Candidate | tuple[fx.Node, str]]:
    """Every softmax over scores of several products, each of its own keys, whose parts are multiplied with values and summed."""
    for node in list(mirror.graph.nodes):
        if (found := logits_of(node)) is None or not _several(found[0]):
            continue
        way = course(mirror, node)
        if way.ends and not way.dropout and changed_between(mirror, found[0], node) is None:
            candidate = _joined(mirror, node, *found, way)
            if candidate is not None:
                yield candidate


def _joined(mirror: Mirror, node: fx.Node, logits: fx.Node, axis: int, way: Course) -> Candidate | None:
    scores = _scores(mirror, node, logits, axis)
    output = _total(mirror, way.ends) if scores is not None else None
    if output is None or scores is None or _aliased(mirror, output):
        return None
    if mirror.requires_grad(output) and any(mirror.severed(n) for n in way.path if not beside(n)):
        return None
    shares = _shares(mirror, node, way, axis, output)
    if shares is None:
        return None
    try:
        dot = one_product(mirror, scores, sizes(node), axis)
        value, places = one_value(mirror, shares, output)
    except (LookupError, Stale):
        return None
    known, first = {piece.made.node: piece for piece in scores}, shares[0]

    def whole(lifter: Lifter, at: Index) -> Expr:
        shift = {symbol: x.value for symbol, x in zip(_symbols(node), at, strict=True) if isinstance(x, Int)}

        def joined(n: Expr) -> Expr | None:
            if not (isinstance(n, Load) and isinstance(n.slot, Dot) and n.slot.node in known and len(shift) == len(at)):
                return None
            expected = [expr.substitute(x, shift) for x in known[n.slot.node].at]
            return Load(Dot(dot), at, n.dtype) if all(map(_equal, n.indices, expected)) else None

        return hoisted(expr.rebuild(lifter.broadcast(logits, at), joined), Dot(dot))

    return Candidate(
        pattern="joined softmax",
        normaliser=node,
        output=output,
        axis=axis,
        length=sizes(logits)[axis],
        summed=sizes(logits)[axis],
        logits=whole,
        probabilities=lambda lifter, index, t: first.made.element(first.side, lifter, index, t),  # its keys begin at 0
        values=lambda lifter, index, t: (value, tuple(t if k is None else index[k] for k in places)),
        empty_rows="nan",
        consumed=way.path | set(way.ends) | {output},
        also=next(iter(way.leaves), ""),
        scores=frozenset(known),
    )


def _several(logits: fx.Node) -> bool:
    """Whether several products may meet in the logits, before anything is lifted."""
    products, seen, queue = 0, {logits}, [logits]
    while queue and products < 2:
        node = queue.pop()
        if contraction(node) is not None:
            products += 1
        elif node is logits or has_rule(node):
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            queue += fresh
    return products > 1


def _symbols(node: fx.Node) -> list[sympy.Symbol]:
    return [sympy.Symbol(f"o{k}", integer=True, nonnegative=True) for k in range(len(sizes(node)))]


def _equal(a: Expr, b: Expr) -> bool:
    return a == b or (isinstance(a, Int) and isinstance(b, Int) and sympy.expand(a.value - b.value) == 0)


def _total(mirror: Mirror, ends: Sequence[fx.Node]) -> fx.Node | None:
    """The sum of all of ``ends``, each once, of their sizes."""
    parts: dict[fx.Node, frozenset[fx.Node]] = {end: frozenset([end]) for end in ends}
    queue, later = list(ends), set[fx.Node]()
    while queue:
        fresh = [u for u in queue.pop().users if operation(u) in ("aten.add", "aten.add_") and u not in later]
        later.update(fresh)
        queue += fresh
    for node in sorted(later, key=lambda n: mirror.position[n]):
        summands = [n for n in node.args[:2] if isinstance(n, fx.Node) and n in parts]
        if len(summands) != 2 or node.kwargs.get("alpha", 1) != 1 or parts[summands[0]] & parts[summands[1]]:
            continue
        plain = not any(mirror.writers(n, mirror.position[n] + 1, mirror.position[node]) for n in summands)
        if plain and sizes(node) == sizes(summands[0]) == sizes(summands[1]):
            parts[node] = parts[summands[0]] | parts[summands[1]]
    return next((n for n, found in parts.items() if found == frozenset(ends)), None)


def _aliased(mirror: Mirror, output: fx.Node) -> bool:
    """Whether the memory of a sum, which may be that of its first part, has other names that are read later."""
    at = mirror.position[output]
    names = [n for n, s in mirror.storage.items() if s == mirror.storage.get(output) and mirror.position[n] < at]
    return any(mirror.leaves_graph(n) or any(mirror.position.get(u, at + 1) > at for u in n.users) for n in names)


def _offset(at: Expr, symbol: sympy.Symbol) -> int | None:
    """``c`` where ``at`` is the symbol plus c."""
    rest = sympy.expand(at.value - symbol) if isinstance(at, Int) else None
    return int(rest) if rest is not None and rest.is_Integer else None


def _tiled(pieces: Sequence[Piece | Share], length: sympy.Expr) -> bool:
    """Whether the pieces, in their order, are all keys, each once."""
    reached = 0
    for piece in pieces:
        if piece.start != reached:
            return False
        reached += piece.length
    return bool(reached == length)


def _scores(mirror: Mirror, node: fx.Node, logits: fx.Node, axis: int) -> list[Piece] | None:
    """The products in the logits, two at least, by their keys, where each part of the keys has one of its own."""
    symbols = _symbols(node)
    extents = Extents(dict(zip(symbols, sizes(node), strict=True)), mirror.ranges)
    try:
        z = Lifter(mirror, extents.ranges, at=node).broadcast(logits, tuple(map(Int, symbols)))
    except Stale:
        return None
    found: dict[tuple[fx.Node, Index], Piece] = {}
    for load in expr.walk(z):
        if not (isinstance(load, Load) and isinstance(load.slot, Dot)):
            continue
        dot, keys = load.slot.node, [k for k, x in enumerate(load.indices) if symbols[axis] in expr.symbols(x)]
        made, start = contraction(dot), _offset(load.indices[keys[0]], symbols[axis]) if len(keys) == 1 else None
        if made is None or start is None or not sizes(dot)[keys[0]].is_Integer:
            return None
        found[dot, load.indices] = Piece(-start, int(sizes(dot)[keys[0]]), made, load.indices)
    pieces = sorted(found.values(), key=lambda piece: piece.start)
    apart = len({piece.made.node for piece in pieces}) == len(pieces) > 1
    return pieces if apart and _tiled(pieces, sizes(node)[axis]) else None


def _shares(mirror: Mirror, node: fx.Node, way: Course, axis: int, output: fx.Node) -> list[Share] | None:
    """The products with values, by the keys that they sum over, where these are all keys, each once."""
    symbols = _symbols(output)
    shares: list[Share] = []
    rows: set[Index] = set()
    for end in way.ends:
        made = contraction(end)
        if made is None or (made.left in way.path) == (made.right in way.path) or not made.summed.is_Integer:
            return None
        side = 0 if made.left in way.path else 1
        extents = Extents({**dict(zip(symbols, sizes(output), strict=True)), _T: made.summed}, mirror.ranges)
        onwards = Lifter(mirror, extents.ranges, at=output, stop=node, course=way.path | {end})
        read = made.element(side, onwards, tuple(map(Int, symbols)), Int(_T))
        start = _offset(read.indices[axis], _T) if isinstance(read, Load) and read.slot is node else None
        if start is None or not isinstance(read, Load):
            return None
        rows.add((*read.indices[:axis], *read.indices[axis + 1 :]))
        shares.append(Share(start, int(made.summed), made, side))
    shares.sort(key=lambda share: share.start)
    return shares if len(rows) == 1 and _tiled(shares, sizes(node)[axis]) else None
