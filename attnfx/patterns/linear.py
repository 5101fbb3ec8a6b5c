"""Attention without a softmax over keys: linear attention in its linear and its quadratic form, whatever its spelling.

A candidate ends in a sum over keys (``w v``) or over features (``f(q) (g(k)^T v)``). Both become one product of elements, so the
form does not matter any more. The roles follow from the indices: the query shares an index d with the key only, the key
shares j with the value only, and the result has i from the query and e from the value. A division is the normaliser where its
divisor is a formula of the row sum of these very weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from attnfx.graphs.mirror import Mirror, is_tensor
from attnfx.patterns.candidate import Refused
from attnfx.patterns.feature_maps import ACTIVATIONS, ARITHMETIC
from attnfx.patterns.lift import _MOVES, Stale, operation
from attnfx.patterns.linear_site import LinearMatch, describe
from attnfx.patterns.products import CASTS, number, sums_of
from attnfx.patterns.readings import openings, read
from attnfx.patterns.values import ValueNumbers

_ELEMENTWISE = ARITHMETIC | {
    f"aten.{name}{suffix}" for name in ("where", "masked_fill", "tril", "triu", "reciprocal", "dropout") for suffix in ("", "_")
} | {"aten.constant_pad_nd", "aten.pad", "aten.cat", "aten.true_divide", "aten.expand_as"}  # fmt: skip
#: How many ways to take parts of a product whole are tried.
_TRIES = 8


def find(mirror: Mirror, taken: Iterable[fx.Node]) -> list[LinearMatch]:
    """Every attention without a softmax over keys, in graph order. ``taken``: nodes of attentions recognised otherwise."""
    numbers = ValueNumbers(mirror)
    used, ends = set(taken), set[fx.Node]()
    found: dict[fx.Node, LinearMatch] = {}
    for node in mirror.graph.nodes:
        if node in used or not is_tensor(node) or not sums_of(node) or not node.meta["val"].is_floating_point():
            continue
        if operation(node) == "aten.cumsum" or not _reads_a_sum(node):
            continue
        try:
            best = _best(mirror, numbers, node)
        except Stale:
            continue
        if best is not None and not best.through & used and best.output not in ends:
            ends.add(best.output)
            found[node] = best
    inner = {n for end, m in found.items() for n in m.inside if n is not end}
    return [m for end, m in found.items() if end not in inner]


def _reads_a_sum(node: fx.Node) -> bool:
    """Whether another sum of products is behind ``node`` with nothing but moves and element-wise operations in between."""
    queue, seen = list(node.all_input_nodes), set(node.all_input_nodes)
    while queue:
        at = queue.pop()
        if is_tensor(at) and sums_of(at):
            return True
        name = operation(at)
        if name in _MOVES or name in CASTS or name in ACTIVATIONS or name in _ELEMENTWISE:
            new = [n for n in at.all_input_nodes if n not in seen]
            seen.update(new)
            queue.extend(new)
    return False


def _best(mirror: Mirror, numbers: ValueNumbers, node: fx.Node) -> LinearMatch | None:
    """The match that ends in the sum ``node``, taken as far as a normaliser behind it."""
    best = _described(mirror, numbers, node, node)
    for later in _behind(node):
        if operation(later) in ("aten.div", "aten.mul", "aten.div_", "aten.mul_"):
            found = _described(mirror, numbers, later, node)
            if found is None:
                continue
            plain = found.site.normaliser == "none"
            if best is None or not plain or _scaling(later):
                best = found if best is None or best.site.normaliser == "none" or not plain else best
    return best


def _scaling(node: fx.Node) -> bool:
    return any(number(a) is not None for a in node.args[:2])


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What the result becomes by moves, casts, multiplications and divisions: a chain without branches that matter."""
    queue, seen = [node], {node}
    while queue and len(seen) < 24:
        for user in queue.pop(0).users:
            name = operation(user)
            known = name in _MOVES or name in CASTS or name in ("aten.div", "aten.mul", "aten.div_", "aten.mul_")
            if user not in seen and known and is_tensor(user):
                seen.add(user)
                queue.append(user)
                yield user


def _described(mirror: Mirror, numbers: ValueNumbers, node: fx.Node, end: fx.Node) -> LinearMatch | None:
    """The reading of ``node`` with the most to say for it."""
    choices: list[LinearMatch] = []
    for opened in _openings(mirror, numbers, node, end):
        waiting, seen = [frozenset[int]()], {frozenset[int]()}
        while waiting and len(seen) < _TRIES:
            atoms = waiting.pop(0)
            for made in _readings(mirror, numbers, node, opened, atoms):
                if isinstance(made, LinearMatch):
                    choices.append(made)
                elif (more := atoms | {numbers(made)}) not in seen:
                    seen.add(more)
                    waiting.append(more)
    return max(choices, key=lambda m: m.evidence, default=None)


def _openings(mirror: Mirror, numbers: ValueNumbers, node: fx.Node, end: fx.Node) -> list[frozenset[fx.Node]]:
    try:
        return openings(mirror, numbers, node, end)
    except Stale:  # an operand was changed in place and cannot be read
        return []


def _readings(
    mirror: Mirror, numbers: ValueNumbers, node: fx.Node, opened: frozenset[fx.Node], atoms: frozenset[int]
) -> Iterator[LinearMatch | fx.Node]:
    try:
        for reading in read(mirror, numbers, node, opened, atoms):
            if isinstance(reading, fx.Node):
                yield reading
                continue
            try:
                yield describe(mirror, numbers, reading)
            except Refused:
                continue
    except Stale:
        return
