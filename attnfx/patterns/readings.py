"""Readings: which element of a product is the query, the key, the value, and which indices are i, j, d and e."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.axes import Extents, divisors
from attnfx.patterns.contraction import contraction
from attnfx.patterns.feature_maps import ACTIVATIONS, history_of
from attnfx.patterns.lift import Dot, Index, Lifter, operation
from attnfx.patterns.products import Expander, Factor, Product, sums_of

#: The query axis of a single query, whose axis of size one needs no index.
ROW = sympy.Symbol("row", integer=True, nonnegative=True)
Hook = Callable[[fx.Node, Index], Expr | None]


class ScoreLifter(Lifter):
    """A lifter that knows activations besides the rules of logits, and may ask ``hook`` first what a node is. One that is
    ``crossing`` follows what has no gradient as well, and notes it in ``detached``."""

    taken_whole = frozenset(("aten.sum", "aten.nan_to_num"))
    hook: Hook | None = None
    crossing = False
    detached = False

    def _element(self, node: fx.Node, index: Index) -> Expr:
        if self.hook is not None and (found := self.hook(node, index)) is not None:
            return found
        apply = ACTIVATIONS.get(operation(node))
        if apply is None or self.severed(node):
            return super()._element(node, index)
        reader, self.reader = self.reader, node
        try:
            made = apply(self, node, index)
        finally:
            self.reader = reader
        return made if made is not None else Load(node, index, node.meta["val"].dtype)

    def severed(self, node: fx.Node) -> bool:
        if self.crossing and super().severed(node):
            self.detached = True
            return False
        return super().severed(node)


@dataclass(frozen=True)
class Reading:
    """A product with roles. ``scores``: the weights as they stand where they are not a product themselves: a formula over the
    contraction ``dot`` (at ``dot_index``) of query and key. ``looked``: the sums that were looked into, where they are read."""

    output: fx.Node
    index: Index
    extents: Extents
    product: Product
    query: Factor
    key: Factor
    value: Factor
    i: sympy.Symbol
    j: sympy.Symbol
    d: sympy.Symbol
    e: sympy.Symbol
    batch: tuple[sympy.Symbol, ...]
    rest: tuple[Factor, ...]
    opened: frozenset[fx.Node]
    atoms: frozenset[int]
    scores: Factor | None = None
    dot: fx.Node | None = None
    dot_index: Index = ()
    looked: Mapping[fx.Node, Index] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """How it is spelled: "running" (running sums), "quadratic" (weights of queries times keys), or "linear"."""
        if any(operation(node) == "aten.cumsum" for node in self.looked):
            return "running"
        pairs = self.scores is not None or any({self.i, self.j} <= _symbols(at) for at in self.looked.values())
        return "quadratic" if pairs else "linear"

    @property
    def dtype(self) -> torch.dtype:
        """The widest type that a sum of it is computed in."""
        sums = [*self.looked, *([] if self.dot is None else [self.dot])]
        found: torch.dtype = functools.reduce(torch.promote_types, (node.meta["val"].dtype for node in sums))
        return found

    @property
    def weights(self) -> tuple[Factor, ...]:
        """The factors of the weights: everything but the value."""
        return tuple(f for f in self.product.factors if f is not self.value)


def read(
    mirror: Mirror, number: Callable[[fx.Node], int], output: fx.Node, opened: frozenset[fx.Node], atoms: frozenset[int]
) -> Iterator[Reading | fx.Node]:
    """Every way to read ``output`` as an attention without a softmax, looking into the sums ``opened``, and the nodes that have
    to be taken whole (added to ``atoms``) for other ways."""
    index, extents = _fresh(mirror, output)
    made = _split(mirror, number, output, opened, atoms, index, extents)
    if made is not None:
        yield from _roles(mirror, output, *made, opened, atoms)


def _start(mirror: Mirror, output: fx.Node, extents: Extents) -> ScoreLifter:
    return ScoreLifter(mirror, extents.ranges, at=output)


def _fresh(mirror: Mirror, output: fx.Node) -> tuple[Index, Extents]:
    symbols = tuple(sympy.Symbol(f"o{k}", integer=True, nonnegative=True) for k in range(len(sizes(output))))
    extents = {s: n for s, n in zip(symbols, sizes(output), strict=True) if n != 1}
    return tuple(Int(s) if s in extents else expr.integer(0) for s in symbols), Extents(extents, mirror.ranges)


def openings(mirror: Mirror, number: Callable[[fx.Node], int], output: fx.Node, end: fx.Node) -> list[frozenset[fx.Node]]:
    """Which sums to look into: the last one alone (weights that are a formula), and with each sum that it reads."""
    index, extents = _fresh(mirror, output)
    expander = Expander(mirror, extents, _start(mirror, output, extents), number, frozenset({end}), frozenset())
    expander.expand(output, index)
    closed = dict.fromkeys(expander.closed)
    found = [frozenset({end})] + [frozenset({end, inner}) for inner in closed if inner is not end]
    for inner in list(closed):  # a running sum of outer products that an einsum or a matmul makes is two sums in one
        if operation(inner) == "aten.cumsum":
            source = inner.args[0]
            while isinstance(source, fx.Node) and not sums_of(source) and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            if isinstance(source, fx.Node) and sums_of(source):
                found.append(frozenset({end, inner, source}))
    return found


def _split(
    mirror: Mirror, number: Callable[[fx.Node], int], output: fx.Node, opened: frozenset[fx.Node], atoms: frozenset[int],
    index: Index, extents: Extents,
) -> tuple[Product, Index, Extents, Mapping[fx.Node, Index]] | None:  # fmt: skip
    """The product, with folded axes of the result taken apart, and where the sums in it are read."""
    for _ in range(8):
        expander = Expander(mirror, extents, _start(mirror, output, extents), number, opened, atoms)
        product = expander.expand(output, index)
        own = Extents({s: n for s, n in expander.extents.sizes.items() if s in extents.sizes}, extents.known)
        wanted = None
        for factor in product.factors:
            for _, at in factor.steps:
                wanted = wanted or divisors(at, own)
        if wanted is None:
            return product, index, expander.extents, expander.looked
        extents, replacement = extents.split(*wanted)
        index = tuple(expr.substitute(x, {wanted[0]: replacement}) for x in index)
    return None


def _roles(
    mirror: Mirror, output: fx.Node, product: Product, index: Index, extents: Extents, looked: Mapping[fx.Node, Index],
    opened: frozenset[fx.Node], atoms: frozenset[int],
) -> Iterator[Reading | fx.Node]:  # fmt: skip
    """Readings of a product, or a multiplication that has to be taken as one operand first."""
    outs = [s for x in index for s in sorted(expr.symbols(x), key=str) if s in extents.sizes]
    own = frozenset(outs)
    sums = list(product.sums)
    common = {
        "output": output, "index": index, "extents": extents, "product": product, "opened": opened, "atoms": atoms,
        "looked": looked,
    }  # fmt: skip
    if len(sums) == 2:
        for j, d in (sums, sums[::-1]):
            yield from _linear_roles(product, outs, own, j, d, common)
    elif len(sums) == 1:
        yield from _formula_roles(mirror, product, outs, own, sums[0], extents, common)


def _linear_roles(
    product: Product,
    outs: list[sympy.Symbol],
    own: frozenset[sympy.Symbol],
    j: sympy.Symbol,
    d: sympy.Symbol,
    common: dict[str, object],
) -> Iterator[Reading | fx.Node]:
    keys = [f for f in product.factors if {j, d} <= f.symbols]
    if len(keys) != 1:
        yield from _group(keys)
        return
    key = keys[0]
    featured = [f for f in product.factors if d in f.symbols and f is not key]
    valued = [f for f in product.factors if j in f.symbols and f is not key and f.symbols & own - key.symbols]
    for value in valued:
        for query in featured:
            if query is value or j in query.symbols or d in value.symbols:
                continue
            rows = [s for s in outs if s in query.symbols and s not in key.symbols and s not in value.symbols]
            columns = [s for s in outs if s in value.symbols and s not in key.symbols and s not in query.symbols]
            if len(columns) != 1:
                continue
            if not rows and not _single_axis(common):
                continue
            i, e = rows[-1] if rows else ROW, columns[0]
            rest = tuple(f for f in product.factors if f not in (query, key, value))
            odd = [f for f in rest if {d, e} & f.symbols or _belongs(f, value, (query, key))]
            if odd:
                yield from _group([query, key, value, *odd])
                continue
            batch = _batch(outs, (query, key, value), i, e)
            if batch is None or any(e in expr.symbols(kept) or d in expr.symbols(kept) for kept in product.keeps):
                continue
            yield Reading(query=query, key=key, value=value, i=i, j=j, d=d, e=e, batch=batch, rest=rest, **common)  # type: ignore[arg-type]


def _single_axis(common: dict[str, object]) -> bool:
    """Whether the result has an axis of size one, which may be that of a single query."""
    index = common["index"]
    assert isinstance(index, tuple)
    return any(expr.is_number(x, 0) for x in index)


def _belongs(factor: Factor, value: Factor, others: tuple[Factor, ...]) -> bool:
    """Whether a factor only scales the rows of the values: it is part of them."""
    apart = factor.within is not None and all(f.within is not value.within for f in others)
    return apart and factor.within is value.within and factor.symbols <= value.symbols


def _group(factors: list[Factor]) -> Iterator[fx.Node]:
    """Multiplications in which several of the factors stand, all of which they are: one operand."""
    seen: dict[fx.Node, int] = {}
    for f in factors:
        if f.within is not None:
            seen[f.within] = seen.get(f.within, 0) + 1
    yield from (node for node, count in seen.items() if count > 1)


def _batch(
    outs: list[sympy.Symbol], factors: tuple[Factor, ...], i: sympy.Symbol, e: sympy.Symbol
) -> tuple[sympy.Symbol, ...] | None:
    found = tuple(s for s in dict.fromkeys(outs) if s not in (i, e))
    return found if all(any(s in f.symbols for f in factors) for s in found) else None


def _formula_roles(
    mirror: Mirror, product: Product, outs: list[sympy.Symbol], own: frozenset[sympy.Symbol], j: sympy.Symbol, extents: Extents,
    common: dict[str, object],
) -> Iterator[Reading | fx.Node]:  # fmt: skip
    """The weights are a formula of the scores: lift it and find the product of queries and keys in it."""
    output = common["output"]
    assert isinstance(output, fx.Node)
    for scores in product.factors:
        if j not in scores.symbols:
            continue
        values = [f for f in product.factors if f is not scores and j in f.symbols and f.symbols & own - scores.symbols]
        if len(values) != 1:
            continue
        value = values[0]
        columns = [s for s in outs if s in value.symbols and s not in scores.symbols]
        lifter = ScoreLifter(mirror, extents.ranges, at=output)
        z = lifter.element(scores.node, scores.index)
        dots = [n for n in expr.walk(z) if isinstance(n, Load) and isinstance(n.slot, Dot) and j in _symbols(n.indices)]
        plain = {(n.slot.node, n.indices) for n in dots if all(isinstance(x, Int) for x in n.indices)}  # type: ignore[attr-defined]
        if len(plain) != 1 or len(columns) != 1:
            continue
        dot, at = plain.pop()
        made = contraction(dot)
        assert made is not None
        d = sympy.Symbol("d", integer=True, nonnegative=True)
        known = Extents({**extents.sizes, d: made.summed}, extents.known)
        lifter = ScoreLifter(mirror, known.ranges, at=output)
        sides = [Factor(history_of(mirror, lifter, side)) for side in made.sides(at, Int(d))]
        if (j in sides[0].symbols) == (j in sides[1].symbols):
            continue
        query, key = sides if j in sides[1].symbols else sides[::-1]
        rows = [s for s in outs if s in query.symbols and s not in key.symbols and s not in value.symbols]
        if not rows and not _single_axis(common):
            continue
        i = rows[-1] if rows else ROW
        batch = _batch(outs, (query, key, value), i, columns[0])
        rest = tuple(f for f in product.factors if f not in (scores, value))
        if batch is None or any(columns[0] in f.symbols or _belongs(f, value, (scores,)) for f in rest):
            yield from _group([value, *rest])
            continue
        yield Reading(
            query=query, key=key, value=value, i=i, j=j, d=d, e=columns[0], batch=batch, rest=rest, scores=scores, dot=dot,
            dot_index=at, **{**common, "extents": known},  # type: ignore[arg-type]
        )  # fmt: skip


def _symbols(index: Index) -> frozenset[sympy.Symbol]:
    return frozenset().union(*(expr.symbols(x) for x in index))


def expanded(
    mirror: Mirror, number: Callable[[fx.Node], int], reading: Reading, node: fx.Node, index: Index
) -> tuple[Product, bool]:
    """Another value of the same graph as a product, stopping where the reading's factors stop; whether it has no gradient."""
    atoms = frozenset(number(f.node) for f in reading.product.factors if f is not reading.value) | reading.atoms
    lifter = _start(mirror, reading.output, reading.extents)
    lifter.crossing = True
    expander = Expander(mirror, reading.extents, lifter, number, None, atoms)
    expander.made = 1000
    return expander.expand(node, index), lifter.detached
