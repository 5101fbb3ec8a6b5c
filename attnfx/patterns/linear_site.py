"""From a reading to a site: operands, feature maps, weights, normaliser; and what tells an attention from a chain of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Load, Score
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.axes import Extents, Operand, understood
from attnfx.patterns.candidate import Layout, Refused
from attnfx.patterns.evidence import activation, aligned_tokens, same_operand
from attnfx.patterns.feature_maps import Mapped, Step, lift_map
from attnfx.patterns.lift import Dot
from attnfx.patterns.normalisers import Divided, normalised
from attnfx.patterns.products import Factor, scale
from attnfx.patterns.program import canonical
from attnfx.patterns.readings import ROW, Reading, ScoreLifter
from attnfx.patterns.weights import split_weights
from attnfx.site import AttentionSite, SideTensor
from attnfx.sites.feature_maps import IDENTITY, FeatureMap

Number = Callable[[fx.Node], int]


@dataclass(frozen=True)
class LinearMatch:
    """An attention without a softmax over keys and the graph nodes it stands for. ``mapped``: queries and keys behind their feature
    maps; ``inside``: the sums it looks into and those of its divisor; ``through``: every node known to be part of it;
    ``evidence``: what speaks for this reading; ``form``: how the model spells it ("quadratic", "running" or "linear");
    ``closer``: the same with a formula for a table of all pairs that this one reads as data."""

    site: AttentionSite
    output: fx.Node
    result: Operand
    query: Operand
    key: Operand
    value: Operand
    layout: Layout
    extents: Extents
    loads: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]
    through: frozenset[fx.Node]
    evidence: int
    mapped: tuple[Operand, Operand]
    form: str
    closer: LinearMatch | None = None

    @property
    def readings(self) -> tuple[LinearMatch, ...]:
        """The closest look first, this one last."""
        return (self,) if self.closer is None else (*self.closer.readings, self)

    @property
    def pattern(self) -> str:
        return "linear"


def describe(mirror: Mirror, number: Number, reading: Reading) -> LinearMatch | fx.Node:
    """The site of a reading, or a node to be taken whole first. Raises Refused where it is no attention for certain."""
    for factor in (reading.query, reading.key, reading.value):
        if not factor.node.meta["val"].is_floating_point():
            raise Refused(f"{factor.node.name} is not made of floating-point numbers")
    divided = normalised(mirror, number, reading)
    if isinstance(divided, fx.Node):
        return divided
    for factor, name in ((reading.key, "keys"), (reading.value, "values")):
        if not activation(mirror, factor.node):
            raise Refused(f"its {name} ({factor.node.name}) are parameters")
    extents = reading.extents
    if reading.i == ROW:
        extents = Extents({**extents.sizes, ROW: sympy.Integer(1)}, extents.known)
    lifter = ScoreLifter(mirror, extents.ranges, at=reading.output)
    query_map = lift_map(mirror, lifter, reading.query.steps, reading.d, reading.i)
    if query_map.map.kind == "softmax_tokens":
        query_map = Mapped(IDENTITY, reading.query.steps)
    key_map = lift_map(mirror, lifter, reading.key.steps, reading.d, reading.j)
    alone = frozenset((reading.i, reading.j, reading.d, reading.e))
    query, query_map = _operand(mirror, reading, query_map, reading.query.steps, extents, alone)
    key, key_map = _operand(mirror, reading, key_map, reading.key.steps, extents, alone)
    value = _root(mirror, reading, reading.value.steps, extents, alone)
    (f, c_q), (g, c_k) = _unscaled(query_map.map), _unscaled(key_map.map)
    mapped_query, mapped_key = (
        raw if m.identity else _root(mirror, reading, factor.steps, extents, alone)
        for raw, m, factor in ((query, f, reading.query), (key, g, reading.key))
    )
    result = understood(reading.output, reading.index, extents, alone)
    if result is None:
        raise Refused("the axes of the result cannot be told apart")
    layout = _layout(reading, key.symbols | value.symbols)

    def site_of(table: bool) -> tuple[AttentionSite, tuple[fx.Node, ...]]:
        weight = _weight(mirror, reading, extents, c_q * c_k, table)
        weight, keep = split_weights(canonical(weight, layout, extents))
        keep = expr.logical_and(keep, *(canonical(k, layout, extents) for k in reading.product.keeps))
        divisor = canonical(divided.divisor, layout, extents)
        formulas, loads = _numbered(mirror, reading, weight, keep, divisor)
        return _site(mirror, reading, layout, extents, formulas, loads, (f, g), divided), loads

    site, loads = site_of(table=True)
    formula = reading.scores is not None and not _scaled_score(site.score)
    masked = _pairwise(site.score) or _pairwise(site.keep)
    both_mapped = not (f.identity or g.identity)
    _suspect(mirror, reading, strong=divided.normaliser != "none" or masked, telling=formula or both_mapped or not g.identity)
    last_axis = expr.symbols(reading.index[-1]) == {reading.e} if reading.index else False
    evidence = 16 * (divided.normaliser != "none") + 8 * masked + 4 * both_mapped + 4 * formula
    evidence += 2 * aligned_tokens(reading) + last_axis
    nodes = {n for f_ in (reading.query, reading.key, reading.value) for n, _ in f_.steps[:-1]}
    through = frozenset(nodes | query_map.through | key_map.through | reading.opened | {reading.output})
    found = LinearMatch(
        site, reading.output, result, query, key, value, layout, extents, loads, reading.opened | divided.sums, through, evidence,
        (mapped_query, mapped_key), reading.form,
    )  # fmt: skip
    if not any(isinstance(n, Load) and _pairwise(n) for n in expr.walk(site.score)):
        return found
    try:
        site, loads = site_of(table=False)
    except Refused:
        return found
    return replace(found, closer=replace(found, site=site, loads=loads)) if site.score != found.site.score else found


def _suspect(mirror: Mirror, reading: Reading, *, strong: bool, telling: bool) -> None:
    """Raises Refused for a product of three matrices that nothing marks as queries, keys and values."""
    common = reading.key.symbols & reading.value.symbols - {reading.j}
    if not common <= reading.query.symbols:
        raise Refused("its queries do not have the batch that keys and values share")
    if not activation(mirror, reading.query.node) and not strong:
        raise Refused("its queries are parameters")
    if strong:
        return
    if not aligned_tokens(reading):
        raise Refused("its keys and values do not have their tokens and features along the same axes")
    shared = [s for s in reading.batch if all(s in f.symbols for f in (reading.query, reading.key, reading.value))]
    if not shared:
        raise Refused("its three matrices have no batch in common")
    if not telling and same_operand(reading):
        raise Refused("one tensor has two of the three roles: a covariance, or a chain of one matrix")


def _pairwise(e: Expr) -> bool:
    """Whether a formula looks at query and key positions together."""
    return {expr.INDEX["i"], expr.INDEX["j"]} <= expr.symbols(e)


def _scaled_score(e: Expr) -> bool:
    return isinstance(e, Score) or (isinstance(e, expr.Call) and e.op in ("mul", "div") and isinstance(e.args[0], Score))


def _root(mirror: Mirror, reading: Reading, steps: tuple[Step, ...], extents: Extents, alone: frozenset[sympy.Symbol]) -> Operand:
    for node, at in reversed(steps):
        found = understood(node, at, extents, alone)
        if found is not None and not mirror.overwritten(node, reading.output):
            return found
    raise Refused(f"the axes of {steps[0][0].name} cannot be told apart")


def _operand(
    mirror: Mirror, reading: Reading, mapped: Mapped, steps: tuple[Step, ...], extents: Extents, alone: frozenset[sympy.Symbol]
) -> tuple[Operand, Mapped]:
    """The operand before its map where its axes can be told apart there, else after it."""
    try:
        return _root(mirror, reading, mapped.steps, extents, alone), mapped
    except Refused:
        return _root(mirror, reading, steps, extents, alone), Mapped(IDENTITY, steps)


def _unscaled(m: FeatureMap) -> tuple[FeatureMap, sympy.Expr]:
    """A map that only multiplies by a number is a factor of the scores."""
    if m.kind == "elementwise" and isinstance(m.formula, expr.Call) and m.formula.op in ("mul", "div"):
        x, c = m.formula.args
        if isinstance(c, Score):
            x, c = c, x
        if isinstance(x, Score) and isinstance(c, expr.Const) and c.value and (m.formula.op == "mul" or x is m.formula.args[0]):
            factor = sympy.Rational(float(c.value))
            return IDENTITY, factor if m.formula.op == "mul" else 1 / factor
    return m, sympy.Integer(1)


def _layout(reading: Reading, shared: frozenset[sympy.Symbol]) -> Layout:
    groups: list[sympy.Symbol] = []
    rest = list(reading.batch)
    while rest and rest[-1] not in shared:
        groups.insert(0, rest.pop())
    heads = [rest.pop()] if rest else []
    return Layout(tuple(rest), tuple(heads), tuple(groups), reading.i, reading.j, reading.d, reading.e)


def _weight(mirror: Mirror, reading: Reading, extents: Extents, factor: sympy.Expr, table: bool) -> Expr:
    """The weight of a pair as a formula of its score; ``table``: what NaN was put away of is taken as it is."""
    lifter = ScoreLifter(mirror, extents.ranges, at=reading.output, inner=(reading.i, reading.j))
    if not table:
        lifter.taken_whole = lifter.taken_whole - {"aten.nan_to_num"}
    scaled = scale(Score(), factor)
    weight: Expr = scaled
    if reading.scores is not None:
        z = lifter.element(reading.scores.node, reading.scores.index)
        slot, at = Dot(reading.dot), reading.dot_index  # type: ignore[arg-type]
        weight = expr.rebuild(z, lambda n: scaled if isinstance(n, Load) and n.slot == slot and n.indices == at else None)
    weight = scale(weight, reading.product.coefficient)
    for rest in reading.rest:
        weight = expr.mul(weight, _plain(lifter, rest), torch.float32)
    return weight


def _plain(lifter: ScoreLifter, factor: Factor) -> Expr:
    e = lifter.element(factor.node, factor.index)
    return expr.cast(e, torch.float32) if e.dtype == torch.bool else e


def _numbered(mirror: Mirror, reading: Reading, *formulas: Expr) -> tuple[tuple[Expr, Expr, Expr], tuple[fx.Node, ...]]:
    """The formulas with loads numbered in order of appearance."""
    loads: dict[fx.Node, int] = {}

    def number(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        source = node.slot.node if isinstance(node.slot, Dot) else node.slot
        assert isinstance(source, fx.Node)
        if not isinstance(source.meta.get("val"), torch.Tensor):
            raise Refused(f"{source.name} is a number known only at run time")
        if mirror.overwritten(source, reading.output):
            raise Refused(f"{source.name} is changed in place before the attention is computed")
        return Load(loads.setdefault(source, len(loads)), tuple(expr.rebuild(x, number) for x in node.indices), node.dtype)

    score, keep, divisor = (expr.rebuild(e, number) for e in formulas)
    allowed = set(expr.INDEX.values()) | set(reading.extents.known.low) | set(reading.extents.known.high)
    sized = {s for n in reading.extents.sizes.values() for s in n.free_symbols}
    for e in (score, keep, divisor):
        if expr.symbols(e) - allowed - sized:
            raise Refused("its weights depend on an axis that is neither batch, head, query nor key")
    return (score, keep, divisor), tuple(loads)


def _site(
    mirror: Mirror, reading: Reading, layout: Layout, extents: Extents, formulas: tuple[Expr, Expr, Expr],
    loads: tuple[fx.Node, ...], maps: tuple[FeatureMap, FeatureMap], divided: Divided,
) -> AttentionSite:  # fmt: skip
    score, keep, divisor = formulas

    def product(atoms: tuple[sympy.Symbol, ...]) -> sympy.Expr:
        return sympy.expand(sympy.Mul(*(extents.sizes[s] for s in atoms)))

    def width(symbol: sympy.Symbol, name: str) -> int:
        size = extents.sizes[symbol]
        if not size.is_Integer:
            raise Refused(f"its {name} is {size}, not known before run time")
        return int(size)

    known, grad = extents.known, mirror.requires_grad(reading.output)
    tensor = reading.query.node.meta["val"]
    heads = product(layout.heads)
    return AttentionSite(
        batch=product(layout.batch), heads=sympy.expand(heads * product(layout.groups)), key_heads=heads,
        queries=extents.sizes[layout.i], keys=extents.sizes[layout.j], head_dim=width(layout.d, "head_dim"),
        value_dim=width(layout.dv, "value head_dim"), dtype=reading.dtype, device=tensor.device.type, score=score, keep=keep,
        fill=0.0, side=tuple(SideTensor(sizes(n), n.meta["val"].dtype, grad and mirror.requires_grad(n)) for n in loads),
        requires_grad=grad, ranges_low=tuple(sorted(known.low.items(), key=str)),
        ranges_high=tuple(sorted(known.high.items(), key=str)),
        normaliser=divided.normaliser, divisor=divisor, divisor_detached=divided.detached, query_map=maps[0], key_map=maps[1],
    )  # fmt: skip
