"""Calls of flex_attention: its score_mod and mask_mod are lifted as any other expression, and its block table is honoured.

A key is kept where ``mask_mod(b, h, i, j)`` holds *and* block ``(i // Q_BLOCK, j // KV_BLOCK)`` is listed in the table. That is
what both of torch's implementations give wherever they agree: the eager one asks mask_mod alone, the compiled one visits listed
blocks alone and does not ask mask_mod in full ones. ``kernel_options`` change how torch's kernel runs and, beyond rounding, not
what it computes; they are ignored. Queries without keys give zero.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr
from attnfx.graphs.callees import Subgraph, derive, subgraph
from attnfx.graphs.capture import called
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.blocks import BlockTable, block_table
from attnfx.patterns.candidate import Candidate, Refused
from attnfx.patterns.lift import Dot, Index, Lifter
from attnfx.patterns.lift_calls import Bound, grafts, lifted

_ATEN: Any = torch.ops.aten


def find(mirror: Mirror) -> Iterator[Candidate | tuple[fx.Node, str]]:
    """Every call of flex_attention whose result is used."""
    calls = [
        n for n in mirror.graph.nodes if n.target is called and _dynamo(mirror, n).target is torch.ops.higher_order.flex_attention
    ]
    tables: dict[tuple[object, ...], BlockTable] = {}
    for node in calls:
        try:
            output = _result(mirror, node)
            if output is not None:
                yield _Call(mirror, node, output, tables).candidate()
        except (Refused, LookupError) as refusal:
            yield node, str(refusal)


def _dynamo(mirror: Mirror, node: fx.Node) -> fx.Node:
    return mirror.origin[node]


def _result(mirror: Mirror, node: fx.Node) -> fx.Node | None:
    """The attention's output; None where nothing uses it. The place that has to know what else of the call is used."""
    maker = _dynamo(mirror, node)
    for user in maker.users:
        if user.op != "call_function" or user.target is not operator.getitem:
            raise Refused(f"all its results together are used by {user.name}")
        if user.args[1] != 0 and user.users:
            what = "log-sum-exp" if user.args[1] == 1 else "largest score of each query"
            raise Refused(f"its {what} is used by {next(iter(user.users)).name}; only its output is computed here")
    found = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
    return found[0] if found and found[0] in mirror.dynamo_of else None


@dataclass(frozen=True)
class _Function:
    """A score_mod or mask_mod: its mirror, and what its parameters after the element's stand for."""

    inner: Subgraph
    buffers: tuple[fx.Node | Expr, ...]
    make: Callable[[fx.Node], fx.Node]

    def at(self, lifter: Lifter, *element: Expr) -> Expr:
        bound: dict[fx.Node, Expr | fx.Node] = dict(zip(self.inner.inputs, (*element, *self.buffers), strict=True))
        return lifted(lifter, self.inner, bound, self.make)


class _Call:
    """One call, with the nodes beside it that say what it computes: ``query @ key.mT`` with keys and values per query head."""

    def __init__(self, mirror: Mirror, node: fx.Node, output: fx.Node, tables: dict[tuple[object, ...], BlockTable]) -> None:
        self.mirror, self.node, self.output = mirror, node, output
        given = mirror.calls[_dynamo(mirror, node)]
        query, key, value, _, block_mask, self.scale, _, score_buffers, mask_buffers = node.args
        dtype = output.meta["val"].dtype
        query, key, value = (self._as(x, dtype) for x in (query, key, value))
        heads, length = sizes(query)[1], sizes(query)[0]
        key, value = (self._shared(x, length, heads) for x in (key, value))
        self.value = value
        self.dot = self._new(_ATEN.matmul.default, query, self._new(_ATEN.transpose.int, key, -2, -1))
        self.working = torch.float64 if dtype == torch.float64 else torch.float32
        self.score_mod = self._function("score_mod", given[3], score_buffers, given[7], scored=True)
        self.mask_mod = self._function("mask_mod", given[4][-1], mask_buffers, given[8], scored=False)
        self.table = block_table(mirror, node, block_mask, sizes(self.dot), tables)

    def _new(self, target: Any, *args: Any) -> fx.Node:
        return derive(self.mirror, self.node, target, *args)

    def _as(self, node: Any, dtype: torch.dtype) -> fx.Node:
        """An operand as autocast reads it."""
        return node if node.meta["val"].dtype == dtype else self._new(_ATEN.to.dtype, node, dtype)

    def _shared(self, node: fx.Node, batch: sympy.Expr, heads: sympy.Expr) -> fx.Node:
        """Keys or values with the batch and the heads of the queries."""
        of_batch, of_heads, *_ = sizes(node)
        if sympy.expand(heads - of_heads) != 0:
            times = sympy.cancel(heads / of_heads)
            if not times.is_Integer:
                raise Refused(
                    f"how many of its {heads} query heads share each of its {of_heads} key heads is not known before run time"
                )
            node = self._new(_ATEN.repeat_interleave.self_int, node, int(times), 1)
        if sympy.expand(batch - of_batch) != 0:
            if of_batch != 1 or not batch.is_Integer:
                raise Refused(f"its queries have a batch of {batch} and its keys one of {of_batch}")
            node = self._new(_ATEN.expand.default, node, [int(batch), -1, -1, -1])
        return node

    def _function(self, name: str, module: Any, shown: Any, given: Any, scored: bool) -> _Function:
        if not isinstance(module, fx.GraphModule):
            raise Refused(f"its {name} is not a graph that can be read")
        if not all(isinstance(x, fx.Node | int) for x in shown):
            raise Refused(f"its {name} captures something that is no tensor and no size of the graph")
        buffers = tuple(x if isinstance(x, fx.Node) else expr.lift(x) for x in shown)
        device = self.node.args[0].meta["val"].device  # type: ignore[union-attr]
        world = self.mirror.world
        assert world is not None
        with world.mode:
            score = [torch.zeros((), dtype=self.working, device=device)] if scored else []
            element = [*score, *(torch.zeros((), dtype=torch.int64, device=device) for _ in range(4))]
        follows = [scored and self.mirror.requires_grad(self.output)] * len(score) + [False] * 4
        follows += [isinstance(x, fx.Node) and is_tensor(x) and self.mirror.requires_grad(x) for x in shown]
        try:
            inner = subgraph(self.mirror, module, [*element, *given], follows)
        except LookupError as why:
            raise Refused(f"its {name} could not be read: {why}") from None
        bound: Bound = dict(zip(inner.inputs, (*([expr.TRUE] * len(element)), *buffers), strict=True))
        return _Function(inner, buffers, grafts(self.mirror, inner, bound, self.node))

    def candidate(self) -> Candidate:
        return Candidate(
            pattern="flex_attention",
            normaliser=self.dot,
            output=self.output,
            axis=3,
            logits=self.logits,
            length=sizes(self.value)[2],
            summed=sizes(self.value)[2],
            probabilities=lambda lifter, index, t: expr.Load(self.dot, (*index[:-1], t), torch.float32),
            values=lambda lifter, index, t: (self.value, (*index[:-2], t, index[-1])),
            empty_rows="zero",
            consumed=frozenset([self.node]),
        )

    def logits(self, lifter: Lifter, index: Index) -> Expr:
        scale = self.scale
        factor = lifter.scalar(scale) if isinstance(scale, fx.Node) else expr.constant(float(scale), torch.float64)  # type: ignore[arg-type]
        z = expr.mul(expr.Load(Dot(self.dot), index, self.working), factor, self.working)
        z = expr.cast(self._lifted("score_mod", self.score_mod, lifter, z, *index), self.working)
        keep = expr.cast(self._lifted("mask_mod", self.mask_mod, lifter, *index), torch.bool)
        if not self._table_implied(lifter, index):
            keep = expr.logical_and(keep, self.table.listed(lifter, index))
        return expr.where(keep, z, expr.constant(-math.inf, self.working), self.working)

    def _table_implied(self, lifter: Lifter, index: Index) -> bool:
        """Whether the block table only repeats mask_mod. Both are read down to the data, whatever is worth loading."""
        plain = Lifter(self.mirror, lifter.ranges, at=lifter.at)
        return self.table.implied(plain, index, expr.cast(self._lifted("mask_mod", self.mask_mod, plain, *index), torch.bool))

    def _lifted(self, name: str, function: _Function, lifter: Lifter, *element: Expr) -> Expr:
        try:
            return function.at(lifter, *element)
        except Refused as why:
            raise Refused(f"in its {name} {why}") from None
