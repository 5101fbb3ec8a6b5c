"""The score program of a match: lifted logits and probabilities in canonical indices, as score, keep, fill and weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.integers import Ranges, floordiv, modulo
from attnfx.algebra.nodes import has_score
from attnfx.expr import INDEX, Expr, Load
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.axes import Extents
from attnfx.patterns.candidate import Layout, Refused
from attnfx.patterns.lift import Dot, operation
from attnfx.patterns.order import settled
from attnfx.patterns.probabilities import ONE, Factor, support
from attnfx.patterns.separate import Logits, separate
from attnfx.patterns.versions import Past, obtainable
from attnfx.sites.facts import prove


@dataclass(frozen=True)
class Program:
    """``score`` where ``keep``, else ``fill``; what a query without keys gives; the weight of the probabilities; the logit
    of a column that has no value; the same logits as half precision computes them, where it does."""

    score: Expr
    keep: Expr
    fill: float
    additive: bool
    empty_rows: str
    weight: Expr = ONE
    sink: Expr | None = None
    literal: Expr | None = None


def program(
    z: Expr, sink: Expr | None, found: Factor, empty_rows: str, length_q: sympy.Expr, length_k: sympy.Expr, known: Ranges
) -> Program:
    """Canonical logits ``z`` and the factor of their probabilities, taken apart. ``empty_rows``: what the normaliser itself
    does with a row that is -inf throughout: "nan", "zero", or "underflow" where no row maximum is taken off."""
    logits = _one_mask(separate(folded(z)), lambda keep: prove(keep, length_q, length_k, known).nonempty)
    tame(logits.score)
    infinite = logits.fill == -math.inf
    if empty_rows == "underflow" and not infinite and logits.keep != expr.TRUE:
        why = f"a query whose keys all have the fill {logits.fill:g} gives NaN"
        raise Refused(f"its softmax takes no row maximum off, so that {why}")
    if empty_rows == "underflow" and _may_be_low(logits.score):
        raise Refused("its softmax takes no row maximum off, so that a query whose scores are all very low gives NaN")
    zero = empty_rows == "zero" or found.guarded or sink is not None  # a sink takes what no key takes
    # Beside a finite fill, data in the scores may hide a whole row.
    hidden = sink is None and any(isinstance(n, Load) and n.dtype.is_floating_point for n in expr.walk(logits.score))
    empty = "zero" if zero and (infinite or hidden) else "nan" if infinite else "fill"
    made = Program(logits.score, logits.keep, logits.fill, logits.additive, empty, found.weight, sink, z if coarse(z) else None)
    return _remasked(made, logits, prove(logits.keep, length_q, length_k, known).nonempty)


def coarse(z: Expr) -> bool:
    """Whether half precision, or a narrower type than before, takes scores that something was added to: near a fill its steps are
    wider than scores are."""
    scored = [n for n in expr.walk(z) if isinstance(n, expr.Call) and n.dtype.is_floating_point and has_score(n)]
    sums = [n for n in scored if n.op in ("add", "sub")]
    if any(n.dtype in (torch.float16, torch.bfloat16) for n in sums):
        return True
    narrowing = [n.args[0] for n in scored if n.op == "cast" and n.dtype.itemsize < n.args[0].dtype.itemsize]
    return any(n is s for e in narrowing for n in expr.walk(e) for s in sums)


def _may_be_low(score: Expr) -> bool:
    """Whether a mask may hide in the scores: a low number put or added, or a float tensor."""
    low = any(isinstance(n, expr.Const) and not isinstance(n.value, bool) and n.value <= -100 for n in expr.walk(score))
    return low or any(isinstance(n, Load) and n.dtype.is_floating_point and isinstance(n.slot, fx.Node) for n in expr.walk(score))


#: A fill at least this low leaves a masked key no probability beside any kept one.
_HOPELESS = -1e30


def _one_mask(logits: Logits, nonempty: Callable[[Expr], bool]) -> Logits:
    """A second mask inside the score (GPT-Neo's window under a causal mask) joined with the first where every query is proved to
    keep a key: beside it, what is masked by either has no probability, whether its fill counts once or twice."""
    score = logits.score
    while isinstance(score, expr.Call) and score.op == "add" and expr.is_number(score.args[1], 0):
        score = score.args[0]
    if not (isinstance(score, expr.Call) and score.op == "where") or logits.keep == expr.TRUE:
        return logits
    inner = separate(score)
    keep = expr.logical_and(logits.keep, inner.keep)
    lowest = max(inner.fill, logits.fill) <= _HOPELESS
    if inner.keep == expr.TRUE or inner.additive or not lowest or not nonempty(keep):
        return logits
    return Logits(inner.score, keep, max(inner.fill, logits.fill), additive=False)


def _remasked(made: Program, logits: Logits, nonempty: bool) -> Program:
    """Probabilities masked again after the softmax: the same mask only settles what a query without keys gives."""
    again, rest, selected = support(made.weight)
    if again == expr.TRUE:
        return made
    if again == logits.keep and made.fill <= _HOPELESS:
        lost = "nan" if made.empty_rows == "nan" and not selected else "zero"
        return replace(made, fill=-math.inf, additive=False, empty_rows=lost, weight=rest, literal=None)
    if made.empty_rows == "nan" and selected and not nonempty and logits.keep != expr.TRUE:
        raise Refused("its probabilities are masked again, by another mask, and a query without keys would give NaN in part")
    return made


#: Above this, float32 keeps too little of a row's log-sum-exp for its gradient.
_LARGEST = 1e5


def tame(score: Expr) -> None:
    """Raises Refused for numbers that lift scores out of the reach of a softmax that is computed block by block."""
    clamps = {a for n in expr.walk(score) if isinstance(n, expr.Call) and n.op == "min" for a in n.args}
    for node in expr.walk(score):
        if isinstance(node, expr.Const) and node.value > _LARGEST and node not in clamps:
            raise Refused(f"its scores hold the number {node.value:g}; up to {_LARGEST:g} is supported")
        if isinstance(node, expr.Call) and node.op in ("mul", "div"):
            low = [a.value for a in node.args if isinstance(a, expr.Const)]
            if any(x == float("-inf") or (x == 0 and node.op == "div") for x in low):
                raise Refused("its scores are multiplied by an infinite number")


@dataclass(frozen=True)
class ScoreFactor:
    """What all scores are multiplied by (or divided): element ``load``, of the queries' rows or of the keys' (``keys``)."""

    load: Load
    divides: bool
    keys: bool

    @property
    def node(self) -> fx.Node:
        assert isinstance(self.load.slot, fx.Node)
        return self.load.slot


@dataclass(frozen=True)
class _Stripped:
    """Slot that stands for scores whose factor was taken out."""

    scored: Expr


def without_factors(
    z: Expr, apart: Callable[[fx.Node], bool], i: sympy.Symbol, j: sympy.Symbol
) -> tuple[Expr, tuple[ScoreFactor, ...]]:
    """``z`` with ``q.k * t`` read as ``q.k``, and what was left out: numbers known only at run time, and tensors that are to be
    kept ``apart``, since a gradient goes to them."""
    factors: list[ScoreFactor] = []
    while len(factors) < 4:
        found: list[ScoreFactor] = []
        stripped = expr.rebuild(z, lambda n: _stripped(n, apart, i, j, found))  # noqa: B023
        if len(set(found)) != 1 or any(isinstance(n, expr.Score) for n in expr.walk(stripped)):
            break  # the scores are read in several ways: no one factor gives them all
        z = expr.rebuild(stripped, lambda n: n.slot.scored if isinstance(n, Load) and isinstance(n.slot, _Stripped) else None)
        factors.append(found[0])
    return z, tuple(factors)


def _stripped(e: Expr, apart: Callable[[fx.Node], bool], i: sympy.Symbol, j: sympy.Symbol, found: list[ScoreFactor]) -> Expr | None:
    if not isinstance(e, expr.Call) or e.op not in ("mul", "div"):
        return None
    for scored, load in (e.args, e.args[::-1])[: 2 if e.op == "mul" else 1]:
        if not (_only_scaled(scored) and isinstance(load, Load) and isinstance(load.slot, fx.Node)):
            continue
        used = frozenset().union(*map(expr.symbols, load.indices))
        if (not load.indices or apart(load.slot)) and not (i in used and j in used):
            found.append(ScoreFactor(load, e.op == "div", j in used))
            return Load(_Stripped(scored), (), torch.float32)
    return None


def _only_scaled(e: Expr) -> bool:
    """The score times numbers."""
    while isinstance(e, expr.Call) and (e.op == "cast" or (e.op in ("mul", "div") and isinstance(e.args[1], expr.Const))):
        e = e.args[0]
    return isinstance(e, expr.Score)


def narrowed(operand: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """The dtype in which a contraction reads an operand: autocast narrows float32 to the dtype of the result."""
    return computed if operand == torch.float32 and computed in (torch.float16, torch.bfloat16) else operand


def canonical(z: Expr, layout: Layout, extents: Extents) -> Expr:
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
    return expr.substitute(settled(z), mapping)


def _total(atoms: Sequence[sympy.Symbol], extents: Extents) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*(extents.sizes[s] for s in atoms)))


def folded(z: Expr) -> Expr:
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


def numbered(mirror: Mirror, at: fx.Node, *programs: Expr) -> tuple[tuple[Expr, ...], list[Past]]:
    """``programs`` with their loads numbered in order of appearance, and the nodes that they load, obtainable at ``at``."""
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
            "aten.sum",
        ):
            raise Refused(f"{source.name} is a second product inside the logits")
        if not obtainable(mirror, past, at):
            raise Refused(f"{source.name} is changed in place before the attention is computed")
        indices = tuple(expr.rebuild(x, number) for x in node.indices)
        return Load(loads.setdefault(past, len(loads)), indices, node.dtype)

    return tuple(expr.rebuild(p, number) for p in programs), list(loads)
