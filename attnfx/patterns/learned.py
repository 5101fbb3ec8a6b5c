"""Learned biases as data: what autograd follows beside the scores, loaded from the tensor that the model computed.

A bias that is read down to the parameters behind it costs no S x S tensor, but a kernel has a gradient only for tensors that are
added to the scores and indexed plainly. Read as the model computed it, the bias has one in every case, and autograd takes it
back through the rest of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy
from torch import fx

from attnfx import expr
from attnfx.algebra.summands import number
from attnfx.expr import Call, Const, Expr, Int, Load
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.lift import Dot
from attnfx.patterns.separate import MASK_LEVEL
from attnfx.patterns.versions import Past

#: How much of a learned bias is formula: all of it, with a second product of the queries beside that with the keys or with
#: every such product as data, only sums and masks of plainly indexed tensors, or nothing.
Reading = Literal["band", "formula", "sum", "data"]


@dataclass(frozen=True)
class Learned:
    """Which nodes a reading takes for data. ``scores``: the products that make the scores; what holds one is never data.
    ``queries`` and ``keys``: their index symbols."""

    reading: Reading
    scores: frozenset[fx.Node]
    queries: sympy.Symbol
    keys: sympy.Symbol

    def is_data(self, mirror: Mirror, node: fx.Node, found: Expr) -> bool:
        """Whether ``node``, whose element has the formula ``found``, is loaded as the model computed it."""
        if self.reading in ("band", "formula") or not mirror.requires_grad(node):
            return False
        loads = [n for n in expr.walk(found) if isinstance(n, Load)]
        if any(isinstance(n.slot, Dot) and n.slot.node in self.scores for n in loads):
            return False
        return not self._plain(mirror, found) if self.reading == "sum" or isinstance(found, Load) else True

    def _plain(self, mirror: Mirror, e: Expr) -> bool:
        """Whether ``e`` is a sum of tensors that has a gradient in a kernel, masked at most."""
        if not _learns(mirror, e):
            return True
        if isinstance(e, Load):
            return all(self._is_axis(x) for x in e.indices)
        if not isinstance(e, Call):
            return False
        first, *rest = e.args
        if e.op == "where":
            low = [x for x in rest if isinstance(x, Const) and x.value <= MASK_LEVEL]
            return len(low) == 1 and not _learns(mirror, first) and all(self._plain(mirror, x) for x in rest)
        if e.op == "mul" and number(first) is not None:
            return self._plain(mirror, rest[0])
        if e.op in ("mul", "div"):
            return number(rest[0]) is not None and self._plain(mirror, first)
        return e.op in ("cast", "neg", "add", "sub") and all(self._plain(mirror, a) for a in e.args)

    def _is_axis(self, index: Expr) -> bool:
        positions = {self.queries, self.keys}
        return isinstance(index, Int) and (index.value in positions or not index.value.free_symbols & positions)


def products(e: Expr | None) -> frozenset[fx.Node]:
    """The contractions that ``e`` reads."""
    loads = () if e is None else (n for n in expr.walk(e) if isinstance(n, Load))
    return frozenset(n.slot.node for n in loads if isinstance(n.slot, Dot))


def _learns(mirror: Mirror, e: Expr) -> bool:
    return any(isinstance(n, Load) and _follows(mirror, n) for n in expr.walk(e))


def _follows(mirror: Mirror, load: Load) -> bool:
    slot = load.slot.node if isinstance(load.slot, Dot) else load.slot
    return slot.requires_grad(mirror) if isinstance(slot, Past) else isinstance(slot, fx.Node) and mirror.requires_grad(slot)
