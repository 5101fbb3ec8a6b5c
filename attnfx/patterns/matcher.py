"""The matcher: from a candidate to an AttentionSite, by the meaning of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.mirror import Mirror, descends, is_tensor, sizes
from attnfx.patterns.added import place, summation, summed_with
from attnfx.patterns.axes import Extents, Operand, divisors, history, rooted, understood
from attnfx.patterns.banded_site import Laid, laid, without_band
from attnfx.patterns.candidate import Candidate, Layout, Refused
from attnfx.patterns.contraction import contraction, short
from attnfx.patterns.learned import Learned, Reading, products
from attnfx.patterns.lift import Dot, Index, Lifter, Stale
from attnfx.patterns.probabilities import Factor, factor
from attnfx.patterns.program import Program, ScoreFactor, canonical, narrowed, numbered, program, without_factors
from attnfx.patterns.unscaled import unscaled
from attnfx.patterns.versions import Past, obtainable
from attnfx.site import AttentionSite, SideTensor

#: What scales the scores from outside, with its axes (none for a number).
Factors = tuple[tuple[ScoreFactor, Operand], ...]
#: Queries, keys and head_dim symbol of each further product that is added to the scores.
Further = tuple[tuple[Operand, Operand, sympy.Symbol], ...]


@dataclass(frozen=True)
class Match:
    """A site and the graph nodes it stands for: operands and result with their axes, side tensors in slot order.

    ``factors`` are numbers known only at run time and learned tensors that scale the scores; queries or keys are multiplied by
    them beforehand.
    ``further``: queries and keys of products that are added to the first one (multi-head latent attention keeps positions
    apart like that): the head_dim of the site is the sum of theirs.
    ``rows``: the candidate's row sums and maxima with their axes. ``band``: the last side tensors, those of a second product.
    """

    site: AttentionSite
    candidate: Candidate
    layout: Layout
    extents: Extents
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    loads: tuple[Past, ...]
    factors: Factors = ()
    further: Further = ()
    rows: tuple[tuple[str, Operand], ...] = ()
    band: Laid | None = None


def match(mirror: Mirror, candidate: Candidate, reading: Reading = "band") -> Match:
    """Raises Refused with the reason where the candidate is not an attention that can be rewritten exactly. ``reading``: of
    learned biases."""
    out = sizes(candidate.output)
    symbols = tuple(sympy.Symbol(f"o{k}", integer=True, nonnegative=True) for k in range(len(out)))
    index: Index = tuple(map(Int, symbols))
    extents = Extents(dict(zip(symbols, out, strict=True)), mirror.ranges)
    first: Refused | None = None
    for rank in range(_PRODUCTS):
        try:
            return _matched(mirror, candidate, index, extents, rank, reading)
        except Refused as refusal:
            first = first or refusal
            if isinstance(refusal, NoProduct):
                break
    assert first is not None
    raise first


#: How many products of two tensors in the logits are tried as the scores.
_PRODUCTS = 4


class NoProduct(Refused):
    """No further product in the logits can be the scores."""


def _matched(mirror: Mirror, candidate: Candidate, index: Index, extents: Extents, rank: int, reading: Reading) -> Match:
    """The match that takes the product of the given ``rank`` for the scores."""
    for _ in range(8):
        attempt = _Attempt(mirror, candidate, index, extents, rank, reading)
        try:
            split = attempt.wanted_split()
        except Stale as stale:
            raise Refused(str(stale)) from None
        if split is None:
            return attempt.finish()
        extents, replacement = extents.split(*split)
        index = tuple(expr.substitute(x, {split[0]: replacement}) for x in index)
    raise Refused("its batch and head axes are folded more than eight deep")


class _Attempt:
    """One reading of a candidate with the result's axes written in given symbols."""

    def __init__(self, mirror: Mirror, candidate: Candidate, index: Index, extents: Extents, rank: int, reading: Reading) -> None:
        self.mirror, self.candidate, self.index, self.rank, self.reading = mirror, candidate, index, rank, reading
        self.j = sympy.Symbol("t", integer=True, nonnegative=True)
        self.d = sympy.Symbol("d", integer=True, nonnegative=True)
        self.extents = Extents({**extents.sizes, self.j: candidate.summed}, extents.known)
        self.lifter = self.new_lifter(None)
        self.weights = self._probability().indices
        self.sink = self._column_without_value()

    def _column_without_value(self) -> Int | None:
        """The one column of the probabilities that is dropped before the values are summed; None where all are summed."""
        way = self.candidate
        column = self.weights[way.axis]
        if column == Int(self.j) and sympy.expand(way.summed - way.length) == 0:
            return None
        start = sympy.expand(column.value - self.j) if isinstance(column, Int) else self.j
        if self.j in start.free_symbols:
            raise Refused(f"the softmax runs over axis {way.axis}, which is not the axis that the values are summed over")
        if sympy.expand(way.summed + 1 - way.length) != 0 or start not in (0, 1):
            raise Refused(f"{way.summed} of its {way.length} probabilities are summed")
        return Int(way.summed if start == 0 else sympy.Integer(0))

    def _probability(self) -> Load:
        """Where the result reads the normaliser."""
        read = self.candidate.probabilities(self._onwards(), self.index, Int(self.j))
        found = {n for n in expr.walk(read) if isinstance(n, Load) and n.slot is self.candidate.normaliser}
        if len(found) != 1:
            raise Refused("its probabilities are mixed with others before the values are summed")
        return found.pop()

    def new_lifter(self, inner: tuple[sympy.Symbol, sympy.Symbol] | None) -> Lifter:
        lifter = Lifter(self.mirror, self.extents.ranges, at=self.candidate.output, inner=inner)
        lifter.reader = self.candidate.normaliser
        return lifter

    def _onwards(self, inner: tuple[sympy.Symbol, sympy.Symbol] | None = None) -> Lifter:
        way = self.candidate
        return Lifter(self.mirror, self.extents.ranges, at=way.output, inner=inner, stop=way.normaliser, course=way.consumed)

    def wanted_split(self) -> tuple[sympy.Symbol, sympy.Expr] | None:
        """A folded axis that has to be taken apart first, to follow the weights or to see shared key heads."""
        if (found := divisors(self.weights, self.extents)) is not None:
            return found
        self.dot, self.dot_index = self._score_dot()
        self._check_sink()
        self.extents = Extents({**self.extents.sizes, self.d: self._summed()}, self.extents.known)
        self.lifter = self.new_lifter(None)
        self.sides = [history(self.lifter, *side, self.dot) for side in self._dot_sides()]
        self.value = history(self.lifter, *self.candidate.values(self.lifter, self.index, Int(self.j)), self.candidate.output)
        carries_j = [any(self.j in expr.symbols(x) for x in side[0][1]) for side in self.sides]
        if carries_j[0] == carries_j[1]:
            raise Refused("the normalised axis is not an axis of exactly one factor of the scores")
        self.query, self.key = self.sides if carries_j[1] else self.sides[::-1]
        self._roles()
        for side in (self.key, self.value):
            for _, at in side:
                found = divisors(at, self.extents)
                if found is not None and found[0] in self.batch:
                    return found
        return None

    def _summed(self) -> sympy.Expr:
        made = contraction(self.dot)
        assert made is not None
        return made.summed

    def _dot_sides(self) -> tuple[tuple[fx.Node, Index], tuple[fx.Node, Index]]:
        made = contraction(self.dot)
        assert made is not None
        return made.sides(self.dot_index, Int(self.d))

    def _score_dot(self) -> tuple[fx.Node, Index]:
        """The contraction that makes the scores, and the index at which the logits read it."""
        z = self.candidate.logits(self.lifter, self.weights)
        dots = [(n.slot.node, n.indices) for n in expr.walk(z) if isinstance(n, Load) and isinstance(n.slot, Dot)]
        dots = [(node, at) for node, at in dots if any(self.j in expr.symbols(x) for x in at)]
        plain = [(node, at) for node, at in dots if all(isinstance(x, Int) for x in at)]
        if not plain and self.extents.sizes[self.j] == 1:
            raise NoProduct("it has a single key, whose weight is always 1: there is nothing to compute")
        if self.rank >= len(plain):
            raise NoProduct("no product of queries and keys was found in the logits")
        # Several products may meet in the logits (biases computed from q): the scores have an axis for the keys alone, and
        # are wider than coordinates, and mostly the last one computed.
        plain.sort(key=lambda found: (Int(self.j) not in found[1], short(found[0]), -self.mirror.position[found[0]]))
        return plain[self.rank]

    def _roles(self) -> None:
        used = {name: frozenset().union(*(expr.symbols(x) for x in side[0][1])) for name, side in
                (("q", self.query), ("k", self.key), ("v", self.value))}  # fmt: skip
        order = [s for x in self.weights for s in sorted(expr.symbols(x), key=lambda s: str(s)) if s in self.extents.sizes]
        rows = [s for s in order if s in used["q"] and s not in used["k"] and s not in used["v"] and s != self.j]
        # Where no axis belongs to queries alone, each has keys of its own, and is an attention with one query.
        self.i = self._queries(rows) if rows else self._vanished("row")
        placed = dict.fromkeys(s for x in self.index for s in sorted(expr.symbols(x), key=str))
        columns = [s for s in placed if s in used["v"] and s not in order and s != self.j and s in self.extents.sizes]
        *self.beside, self.dv = columns or [self._vanished("column")]  # one number a key
        self.batch = [s for s in dict.fromkeys(order) if s not in (self.i, self.j)]
        spread = [s for s in self.batch if s in used["k"] and s not in used["v"]]
        if not rows and spread:
            raise Refused("its keys differ for every query and its values do not: the scores are mixed by another product")

    def _queries(self, rows: list[sympy.Symbol]) -> sympy.Symbol:
        """The axis of queries among those that only queries have: masks and biases know it, it stands alone, and it is long."""
        z = self.candidate.logits(self.lifter, self.weights)
        apart = expr.rebuild(z, lambda n: expr.integer(0) if isinstance(n, Load) and isinstance(n.slot, Dot) else None)
        known = expr.symbols(apart)
        folded = {s for x in self.query[0][1] if len(held := expr.symbols(x)) > 1 for s in held}

        def rank(s: sympy.Symbol) -> tuple[bool, bool, float, int]:
            size = self.extents.sizes[s]
            return s in known, s not in folded, float(size) if size.is_Integer else float("inf"), rows.index(s)

        return max(rows, key=rank)

    def _vanished(self, name: str) -> sympy.Symbol:
        """An axis of size one that no index shows."""
        symbol = sympy.Symbol(name, integer=True, nonnegative=True)
        self.extents = Extents({**self.extents.sizes, symbol: sympy.Integer(1)}, self.extents.known)
        return symbol

    # The rest runs once no axis has to be split any more.

    def finish(self) -> Match:
        alone = frozenset((self.i, self.j, self.d, *self.beside, self.dv))
        until = self.candidate.output

        def root(side: Sequence[tuple[fx.Node, Index]], reader: fx.Node, name: str) -> Operand:
            extents = self.extents
            if name == "values" and self.candidate.pattern == "scaled_dot_product_attention":
                # torch's attention never compares the lengths of keys and values: two caches may have a symbol each
                own = sizes(self.candidate.normaliser.args[2])[-2]  # type: ignore[arg-type]
                extents = Extents({**extents.sizes, self.j: own}, extents.known)
            return rooted(self.mirror, side, reader, until, extents, alone, name)

        query, key = root(self.query, self.dot, "queries"), root(self.key, self.dot, "keys")
        value = root(self.value, until, "values")
        further = self._further(alone)
        layout = self._layout(frozenset().union(key.symbols, value.symbols, *(k.symbols for _, k, _ in further)))
        output = understood(self.candidate.output, self.index, self.extents, alone)
        if output is None:
            raise Refused("the axes of the result cannot be told apart")
        scale = 1.0
        if not further:
            values = self.value[0][0].meta["val"].dtype
            query, query_scale = unscaled(self.lifter, query, until, values)
            key, key_scale = unscaled(self.lifter, key, until, values)
            scale = query_scale * key_scale
        site, loads, factors, band = self._site(layout, query, key, value, scale, further)
        rows, extents = self._rows(alone), self.extents if band is None else band.extents
        return Match(site, self.candidate, layout, extents, query, key, value, output, loads, factors, further, rows, band)

    def _rows(self, alone: frozenset[sympy.Symbol]) -> tuple[tuple[str, Operand], ...]:
        """The row sums and maxima that the model reads, with their axes."""
        axis, found = self.candidate.axis, []
        for kind, node in self.candidate.rows:
            kept = (Int(sympy.Integer(0)),) if len(sizes(node)) == len(self.weights) else ()
            row = understood(node, (*self.weights[:axis], *kept, *self.weights[axis + 1 :]), self.extents, alone)
            if row is None or self.sink is not None:
                raise Refused(f"its row {kind} ({node.name}) is not that of the rows that meet the values")
            found.append((kind, row))
        return tuple(found)

    def _further(self, alone: frozenset[sympy.Symbol]) -> Further:
        """The operands of products that are added to the first one; () where the sum cannot be read as one product."""
        z = self.candidate.logits(self.lifter, self.weights)
        added = summed_with(z, Load(Dot(self.dot), self.dot_index, self.dot.meta["val"].dtype))
        self.sum: Expr | None = None
        found: list[tuple[Operand, Operand, sympy.Symbol]] = []
        extents, dtype = self.extents, self.dot.meta["val"].dtype
        for k, load in enumerate(added[1] if added is not None else ()):
            node, at = place(load)
            product, d = contraction(node), summation(k)
            assert product is not None
            extents = Extents({**extents.sizes, d: product.summed}, extents.known)
            sides = [understood(*side, extents, alone | {d}) for side in product.sides(at, Int(d))]
            whole = [s for s in sides if s is not None and not self.mirror.overwritten(s.node, self.candidate.output)]
            if len(whole) != 2 or [self.j in s.symbols for s in whole].count(True) != 1 or load.dtype != dtype:
                return ()
            query, key = whole if self.j in whole[1].symbols else whole[::-1]
            if self.i in key.symbols or any(s.node.meta["val"].dtype != dtype for s in whole):
                return ()
            found.append((query, key, d))
        if found and added is not None:
            self.extents, self.sum = extents, added[0]
        return tuple(found)

    def _layout(self, shared: frozenset[sympy.Symbol]) -> Layout:
        """Trailing batch-like axes that neither keys nor values have are groups of query heads; the one before them is
        the key head."""
        groups: list[sympy.Symbol] = []
        rest = list(self.batch)
        while rest and rest[-1] not in shared:
            groups.insert(0, rest.pop())
        heads = [rest.pop()] if rest else []
        return Layout(tuple(rest), tuple(heads), tuple(groups), self.i, self.j, self.d, self.dv, tuple(self.beside))

    def _site(
        self, layout: Layout, query: Operand, key: Operand, value: Operand, scale: float, further: Further
    ) -> tuple[AttentionSite, tuple[Past, ...], Factors, Laid | None]:
        lifter = self.new_lifter((self.i, self.j))
        lifter.learned = Learned(self.reading, products(self.sum) or frozenset({self.dot}), self.i, self.j)
        z = self.candidate.logits(lifter, self.weights)
        z = expr.rebuild(z, lambda n: expr.Score() if n == self.sum or self._is_product(n) else None)
        if scale != 1.0:
            scaled = expr.mul(expr.Score(), expr.constant(scale, torch.float64), torch.float32)
            z = expr.rebuild(z, lambda n: scaled if isinstance(n, expr.Score) else None)
        z, outside = without_factors(z, self._learned, self.i, self.j)
        factors = tuple((f, self._factor_operand(f)) for f in outside)
        found = factor(self.candidate.probabilities(self._onwards(lifter.inner), self.index, Int(self.j)), self._probability())
        if self.candidate.rows and found != Factor():
            raise Refused("its exponentials are changed on the way to the values, and their row sums are not")
        tensors = [n.meta["val"] for n in (query.node, key.node, value.node)]
        computed = (self.dot.meta["val"].dtype, self.dot.meta["val"].dtype, self.candidate.output.meta["val"].dtype)
        dtypes = [narrowed(t.dtype, to) for t, to in zip(tensors, computed, strict=True)]
        if len(set(dtypes)) != 1:
            raise Refused(f"queries, keys and values have dtypes {', '.join(str(t).removeprefix('torch.') for t in dtypes)}")
        dropped = self._dropped()

        def separated(z: Expr) -> Program:
            return program(
                canonical(z, layout, self.extents), None if dropped is None else canonical(dropped, layout, self.extents),
                replace(found, weight=canonical(found.weight, layout, self.extents)), self.candidate.empty_rows,
                self.extents.sizes[layout.i], self.extents.sizes[layout.j], self.extents.known,
            )  # fmt: skip

        made, second, until = separated(z), None, self.candidate.output
        if self.reading == "band":
            z, second = without_band(z, separated, layout, self.extents, until, lambda: self.new_lifter(None), dtypes[0])
            made = made if second is None else separated(z)
        sink, literal = (() if e is None else (e,) for e in (made.sink, made.literal))
        formulas, loads = numbered(self.mirror, self.candidate.output, made.score, made.keep, *sink, made.weight, *literal)
        score, keep, weight = *formulas[:2], formulas[2 + len(sink)]
        if any(descends(past.node, self.candidate.normaliser) for past in loads):
            raise Refused("its probabilities are multiplied by something that is computed from them")
        if any(descends(past.node, dot) for past in loads for dot in (self.dot, *self.candidate.scores)):
            raise Refused("its scores are changed by something that is computed from all of them")
        grad = self.mirror.requires_grad(self.candidate.output)
        heads, ranges, band = self._product(layout.heads), self.extents.known, None
        side = [SideTensor(sizes(t.node), t.node.meta["val"].dtype, grad and t.requires_grad(self.mirror)) for t in loads]
        if second is not None:
            shared = None if further or any(not f.keys for f in outside) else query
            band = laid(second, len(loads), shared, layout.d, layout, self.lifter, until, dtypes[0])
            side += band.side
        site = AttentionSite(
            batch=self._product(layout.batch), heads=sympy.expand(heads * self._product(layout.groups)), key_heads=heads,
            queries=self.extents.sizes[layout.i], keys=self.extents.sizes[layout.j],
            head_dim=sum(self._number(d, "head_dim") for d in (layout.d, *(d for _, _, d in further))),
            value_dim=math.prod(self._number(s, "value head_dim") for s in layout.width),
            dtype=dtypes[0], device=tensors[0].device.type, score=score, keep=keep, fill=made.fill, additive=made.additive,
            empty_rows=made.empty_rows, dropout=self.candidate.dropout, weight=weight, sink=formulas[2] if sink else None,
            literal=formulas[-1] if literal else None,
            side=tuple(side), band=None if band is None else band.band, requires_grad=grad,
            normaliser="max" if self.candidate.rows else "softmax", ranges_low=tuple(sorted(ranges.low.items(), key=str)),
            ranges_high=tuple(sorted(ranges.high.items(), key=str)),
        )  # fmt: skip
        return site, tuple(loads), factors, band

    def _learned(self, node: fx.Node) -> bool:
        return self.mirror.requires_grad(self.candidate.output) and self.mirror.requires_grad(node)

    def _factor_operand(self, f: ScoreFactor) -> Operand:
        """A factor of the scores with its axes understood."""
        until = self.candidate.output
        if not obtainable(self.mirror, Past(f.node, f.node), until):
            raise Refused(f"{f.node.name} is changed in place before the attention is computed")
        shape = sizes(f.node) if is_tensor(f.node) else ()
        found = understood(f.node, f.load.indices, self.extents, frozenset((self.i, self.j))) if shape else Operand(f.node, ())
        if found is None:
            raise Refused(f"the axes of a factor of the scores ({f.node.name}) cannot be told apart")
        return found

    def _is_product(self, e: Expr) -> bool:
        """Whether ``e`` is the product of queries and keys as the logits read it."""
        return isinstance(e, Load) and e.slot == Dot(self.dot) and e.indices == self.dot_index

    def _dropped(self) -> Expr | None:
        """The logit of the column that has no value."""
        if self.sink is None:
            return None
        axis = self.candidate.axis
        return self.candidate.logits(self.new_lifter(None), (*self.weights[:axis], self.sink, *self.weights[axis + 1 :]))

    def _check_sink(self) -> None:
        z = self._dropped()
        if z is not None and any(isinstance(n, Load) and n.slot == Dot(self.dot) for n in expr.walk(z)):
            raise Refused("one of its probabilities is dropped, and that is no sink's but a key's")

    def _product(self, atoms: Sequence[sympy.Symbol]) -> sympy.Expr:
        return sympy.expand(sympy.Mul(*(self.extents.sizes[s] for s in atoms)))

    def _number(self, symbol: sympy.Symbol, name: str) -> int:
        size = self.extents.sizes[symbol]
        if not size.is_Integer:
            raise Refused(f"its {name} is {size}, not known before run time")
        return int(size)
