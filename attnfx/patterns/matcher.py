"""The matcher: from a candidate to an AttentionSite, by the meaning of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.capture import Mirror, sizes
from attnfx.expr import INDEX, Expr, Int, Load
from attnfx.integers import Ranges, floordiv, modulo
from attnfx.patterns.axes import Extents, Operand, divisors, history, rooted, through_scaling, understood
from attnfx.patterns.candidate import Candidate, Refused
from attnfx.patterns.contraction import contraction
from attnfx.patterns.lift import Dot, Index, Lifter, Stale, operation
from attnfx.patterns.separate import separate
from attnfx.patterns.versions import Past, as_read, hidden_by, obtainable
from attnfx.site import AttentionSite, SideTensor


@dataclass(frozen=True)
class Layout:
    """The atoms of every canonical axis: batch, key head and group symbols, then query, key, head_dim and value_dim symbols."""

    batch: tuple[sympy.Symbol, ...]
    heads: tuple[sympy.Symbol, ...]
    groups: tuple[sympy.Symbol, ...]
    i: sympy.Symbol
    j: sympy.Symbol
    d: sympy.Symbol
    dv: sympy.Symbol


@dataclass(frozen=True)
class Match:
    """A site and the graph nodes it stands for: operands and result with their axes, side tensors in slot order.

    ``factors`` are numbers known only at run time that scale the scores; the query is multiplied by them beforehand.
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
    factors: tuple[fx.Node, ...] = ()


def match(mirror: Mirror, candidate: Candidate) -> Match:
    """Raises Refused with the reason where the candidate is not an attention that can be rewritten exactly."""
    out = sizes(candidate.output)
    symbols = tuple(sympy.Symbol(f"o{k}", integer=True, nonnegative=True) for k in range(len(out)))
    index: Index = tuple(map(Int, symbols))
    extents = Extents(dict(zip(symbols, out, strict=True)), mirror.ranges)
    for _ in range(8):
        attempt = _Attempt(mirror, candidate, index, extents)
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

    def __init__(self, mirror: Mirror, candidate: Candidate, index: Index, extents: Extents) -> None:
        self.mirror, self.candidate, self.index = mirror, candidate, index
        weights = sizes(candidate.normaliser)
        self.j = sympy.Symbol("t", integer=True, nonnegative=True)
        self.d = sympy.Symbol("d", integer=True, nonnegative=True)
        length = weights[candidate.axis] if candidate.pattern == "softmax" else sizes(candidate.normaliser.args[1])[-2]  # type: ignore[arg-type]
        self.extents = Extents({**extents.sizes, self.j: length}, extents.known)
        self.lifter = self.new_lifter(None)
        self.weights = candidate.weights(self.lifter, index, Int(self.j))
        if self.weights[candidate.axis] != Int(self.j):
            raise Refused(f"the softmax runs over axis {candidate.axis}, which is not the axis that the values are summed over")

    def new_lifter(self, inner: tuple[sympy.Symbol, sympy.Symbol] | None) -> Lifter:
        lifter = Lifter(self.mirror, self.extents.ranges, at=self.candidate.output, inner=inner)
        lifter.reader = self.candidate.normaliser
        return lifter

    def wanted_split(self) -> tuple[sympy.Symbol, sympy.Expr] | None:
        """A folded axis that has to be taken apart first, to follow the weights or to see shared key heads."""
        if (found := divisors(self.weights, self.extents)) is not None:
            return found
        self.dot, self.dot_index = self._score_dot()
        self.extents = Extents({**self.extents.sizes, self.d: self._summed()}, self.extents.known)
        self.lifter = self.new_lifter(None)
        self.sides = [history(self.lifter, *side, self.dot) for side in self._dot_sides()]
        self.value = history(self.lifter, *self.candidate.values(self.index, Int(self.j)), self.candidate.output)
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
        if not plain:
            raise Refused("no product of queries and keys was found in the logits")
        # Several contractions may meet in the logits (a bias computed from q): the scores are the last one computed.
        return max(plain, key=lambda found: self.mirror.position[found[0]])

    def _roles(self) -> None:
        used = {name: frozenset().union(*(expr.symbols(x) for x in side[0][1])) for name, side in
                (("q", self.query), ("k", self.key), ("v", self.value))}  # fmt: skip
        order = [s for x in self.weights for s in sorted(expr.symbols(x), key=lambda s: str(s)) if s in self.extents.sizes]
        rows = [s for s in order if s in used["q"] and s not in used["k"] and s not in used["v"] and s != self.j]
        self.i = rows[-1] if rows else self._single_row()
        columns = [s for s in used["v"] if s not in order and s != self.j and s in self.extents.sizes]
        if len(columns) != 1:
            raise Refused("the values do not have exactly one axis of their own")
        self.dv = columns[0]
        self.batch = [s for s in dict.fromkeys(order) if s not in (self.i, self.j)]

    def _single_row(self) -> sympy.Symbol:
        """One query only: its axis has size one and may have vanished in a view."""
        if not any(n == 1 for n in self.extents.sizes.values()):
            raise Refused("no axis of the scores belongs to the queries alone")
        row = sympy.Symbol("row", integer=True, nonnegative=True)
        self.extents = Extents({**self.extents.sizes, row: sympy.Integer(1)}, self.extents.known)
        return row

    # The rest runs once no axis has to be split any more.

    def finish(self) -> Match:
        alone = frozenset((self.i, self.j, self.d, self.dv))
        until = self.candidate.output

        def root(side: Sequence[tuple[fx.Node, Index]], reader: fx.Node, name: str) -> Operand:
            return rooted(self.mirror, side, reader, until, self.extents, alone, name)

        query, key = root(self.query, self.dot, "queries"), root(self.key, self.dot, "keys")
        value = root(self.value, until, "values")
        layout = self._layout(key.symbols | value.symbols)
        output = understood(self.candidate.output, self.index, self.extents, alone)
        if output is None:
            raise Refused("the axes of the result cannot be told apart")
        query, query_scale = self._unscaled(query)
        key, key_scale = self._unscaled(key)
        site, loads, factors = self._site(layout, query, key, value, query_scale * key_scale)
        return Match(site, self.candidate, layout, self.extents, query, key, value, output, loads, factors)

    def _layout(self, shared: frozenset[sympy.Symbol]) -> Layout:
        """Trailing batch-like axes that neither keys nor values have are groups of query heads; the one before them is
        the key head."""
        groups: list[sympy.Symbol] = []
        rest = list(self.batch)
        while rest and rest[-1] not in shared:
            groups.insert(0, rest.pop())
        heads = [rest.pop()] if rest else []
        return Layout(tuple(rest), tuple(heads), tuple(groups), self.i, self.j, self.d, self.dv)

    def _unscaled(self, operand: Operand) -> tuple[Operand, float]:
        """The operand before multiplications by numbers and widening casts, and the product of the numbers."""
        scale = 1.0
        while True:
            node, scale_before = operand.node, scale
            if self.lifter.severed(node) or operand.after is not node:
                return operand, scale
            if (
                (found := through_scaling(node)) is not None
                and sizes(found[0]) == sizes(node)
                and self._same_dtype(*found[:1], node)
            ):
                older, scale = found[0], scale * found[1]
            elif operation(node) in ("aten.to", "aten._to_copy") and self._widens(node):
                older = node.args[0]  # type: ignore[assignment]
            else:
                return operand, scale
            past = as_read(self.mirror, older, node)
            hidden = hidden_by(self.mirror, past, self.candidate.output)
            if hidden is not None or not obtainable(self.mirror, past, self.candidate.output):
                return operand, scale_before
            operand = Operand(older, operand.axes, past.after)

    def _same_dtype(self, a: fx.Node, b: fx.Node) -> bool:
        return bool(a.meta["val"].dtype == b.meta["val"].dtype)

    def _widens(self, node: fx.Node) -> bool:
        """A cast of halves to float32 whose result is only multiplied: the products are the same without it, where
        values are halves too."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = self.value[0][0].meta["val"].dtype
        same = source.meta["val"].device == node.meta["val"].device
        return same and bool(source.meta["val"].dtype == value) and value.itemsize == 2 and node.meta["val"].dtype == torch.float32

    def _site(
        self, layout: Layout, query: Operand, key: Operand, value: Operand, scale: float
    ) -> tuple[AttentionSite, tuple[Past, ...], tuple[fx.Node, ...]]:
        lifter = self.new_lifter((self.i, self.j))
        z = self.candidate.logits(lifter, self.weights)
        z = expr.rebuild(
            z,
            lambda n: expr.Score() if isinstance(n, Load) and n.slot == Dot(self.dot) and n.indices == self.dot_index else None,
        )
        if scale != 1.0:
            scaled = expr.mul(expr.Score(), expr.constant(scale, torch.float64), torch.float32)
            z = expr.rebuild(z, lambda n: scaled if isinstance(n, expr.Score) else None)
        z, factors = _without_factors(z)
        for factor in factors:
            if not obtainable(self.mirror, Past(factor, factor), self.candidate.output):
                raise Refused(f"{factor.name} is changed in place before the attention is computed")
        logits = separate(_folded(_canonical(z, layout, self.extents)))
        _tame(logits.score)
        score, keep, loads = self._numbered(logits.score, logits.keep)
        fill = logits.fill
        empty = (
            "zero" if self.candidate.empty_rows == "zero" and fill == float("-inf") else "nan" if fill == float("-inf") else "fill"
        )
        if self.candidate.empty_rows == "underflow" and empty == "fill" and keep != expr.TRUE:
            raise Refused(f"its softmax takes no row maximum off, so that a query whose keys all have the fill {fill:g} gives NaN")
        tensors = [n.meta["val"] for n in (query.node, key.node, value.node)]
        computed = (self.dot.meta["val"].dtype, self.dot.meta["val"].dtype, self.candidate.output.meta["val"].dtype)
        dtypes = [_narrowed(t.dtype, to) for t, to in zip(tensors, computed, strict=True)]
        if len(set(dtypes)) != 1:
            raise Refused(f"queries, keys and values have dtypes {', '.join(str(t).removeprefix('torch.') for t in dtypes)}")
        product = self._product
        grad = self.mirror.requires_grad(self.candidate.output)
        heads = product(layout.heads)
        ranges = self.extents.known
        site = AttentionSite(
            batch=product(layout.batch), heads=sympy.expand(heads * product(layout.groups)), key_heads=heads,
            queries=self.extents.sizes[layout.i], keys=self.extents.sizes[layout.j],
            head_dim=self._number(layout.d, "head_dim"), value_dim=self._number(layout.dv, "value head_dim"),
            dtype=dtypes[0], device=tensors[0].device.type, score=score, keep=keep, fill=fill, additive=logits.additive,
            empty_rows=empty, dropout=self.candidate.dropout,
            side=tuple(SideTensor(sizes(t.node), t.node.meta["val"].dtype, grad and t.requires_grad(self.mirror)) for t in loads),
            requires_grad=grad,
            ranges_low=tuple(sorted(ranges.low.items(), key=str)), ranges_high=tuple(sorted(ranges.high.items(), key=str)),
        )  # fmt: skip
        return site, tuple(loads), factors

    def _product(self, atoms: Sequence[sympy.Symbol]) -> sympy.Expr:
        return sympy.expand(sympy.Mul(*(self.extents.sizes[s] for s in atoms)))

    def _number(self, symbol: sympy.Symbol, name: str) -> int:
        size = self.extents.sizes[symbol]
        if not size.is_Integer:
            raise Refused(f"its {name} is {size}, not known before run time")
        return int(size)

    def _numbered(self, score: Expr, keep: Expr) -> tuple[Expr, Expr, list[Past]]:
        """Both expressions with loads numbered in order of appearance."""
        loads: dict[Past, int] = {}

        def number(node: Expr) -> Expr | None:
            if not isinstance(node, Load):
                return None
            source = node.slot.node if isinstance(node.slot, Dot) else node.slot
            past = source if isinstance(source, Past) else Past(source, source)  # type: ignore[arg-type]
            source = past.node
            if not isinstance(source.meta.get("val"), torch.Tensor):
                raise Refused(f"{source.name} is a number known only at run time")
            if isinstance(node.slot, Dot) and operation(source) not in (
                "aten.matmul",
                "aten.bmm",
                "aten.einsum",
                "aten.mm",
            ):
                raise Refused(f"{source.name} is a second product inside the logits")
            if not obtainable(self.mirror, past, self.candidate.output):
                raise Refused(f"{source.name} is changed in place before the attention is computed")
            indices = tuple(expr.rebuild(x, number) for x in node.indices)
            return Load(loads.setdefault(past, len(loads)), indices, node.dtype)

        return expr.rebuild(score, number), expr.rebuild(keep, number), list(loads)


#: Above this, float32 keeps too little of a row's log-sum-exp for its gradient.
_LARGEST = 1e5


def _tame(score: Expr) -> None:
    """Raises Refused for numbers that lift scores out of the reach of a softmax that is computed block by block."""
    for node in expr.walk(score):
        if isinstance(node, expr.Const) and node.value > _LARGEST:
            raise Refused(f"its scores hold the number {node.value:g}; up to {_LARGEST:g} is supported")
        if isinstance(node, expr.Call) and node.op in ("mul", "div"):
            low = [a.value for a in node.args if isinstance(a, expr.Const)]
            if any(x == float("-inf") or (x == 0 and node.op == "div") for x in low):
                raise Refused("its scores are multiplied by an infinite number")


def _without_factors(z: Expr) -> tuple[Expr, tuple[fx.Node, ...]]:
    """``z`` with ``q.k * number`` read as ``q.k`` where the number is known only at run time, and these numbers."""
    factors: list[fx.Node] = []
    scaled = expr.Load("scaled", (), torch.float32)

    def strip(node: Expr) -> Expr | None:
        if isinstance(node, expr.Call) and node.op == "mul":
            for scored, number in (node.args, node.args[::-1]):
                if (
                    isinstance(scored, expr.Score)
                    and isinstance(number, Load)
                    and not number.indices
                    and isinstance(number.slot, fx.Node)
                ):
                    factors.append(number.slot)
                    return scaled
        return None

    found = expr.rebuild(z, strip)
    if len(factors) != 1 or any(isinstance(n, expr.Score) for n in expr.walk(found)):
        return z, ()  # the scores are read in several ways: no one factor of the query gives them all
    return expr.rebuild(found, lambda n: expr.Score() if n == scaled else None), tuple(factors)


def _narrowed(operand: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """The dtype in which a contraction reads an operand: autocast narrows float32 to the dtype of the result."""
    return computed if operand == torch.float32 and computed in (torch.float16, torch.bfloat16) else operand


def _canonical(z: Expr, layout: Layout, extents: Extents) -> Expr:
    """``z`` in the canonical index symbols b, h, i, j."""
    mapping = {layout.i: INDEX["i"], layout.j: INDEX["j"]}
    ranges = Ranges(
        {},
        {
            INDEX["b"]: _total(layout.batch, extents) - 1,
            INDEX["h"]: _total((*layout.heads, *layout.groups), extents) - 1,
        },
    )
    for name, atoms in (("b", layout.batch), ("h", (*layout.heads, *layout.groups))):
        below = sympy.Integer(1)
        for k, atom in reversed(list(enumerate(atoms))):
            digit = floordiv(INDEX[name], below)
            mapping[atom] = digit if k == 0 else modulo(digit, extents.sizes[atom], ranges)
            below = sympy.expand(below * extents.sizes[atom])
    return expr.substitute(z, mapping)


def _total(atoms: Sequence[sympy.Symbol], extents: Extents) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*(extents.sizes[s] for s in atoms)))


def _folded(z: Expr) -> Expr:
    """``(x * c) * d`` as ``x * (c * d)`` for number factors of the score: one multiplication in the tile."""

    def fold(node: Expr) -> Expr | None:
        if isinstance(node, expr.Call) and node.op in ("mul", "div") and isinstance(node.args[1], expr.Const):
            inner = fold(node.args[0]) or node.args[0]
            by = float(node.args[1].value)
            if by == 0 and node.op == "div":
                return None
            if (
                isinstance(inner, expr.Call)
                and inner.op == "mul"
                and isinstance(inner.args[0], expr.Score)
                and isinstance(inner.args[1], expr.Const)
            ):
                factor = float(inner.args[1].value) * by if node.op == "mul" else float(inner.args[1].value) / by
                return expr.call("mul", inner.args[0], expr.Const(factor, torch.float64), dtype=torch.float32)
            if isinstance(inner, expr.Score):
                return expr.call("mul", inner, expr.Const(by if node.op == "mul" else 1 / by, torch.float64), dtype=torch.float32)
        return None

    return expr.rebuild(z, fold)
