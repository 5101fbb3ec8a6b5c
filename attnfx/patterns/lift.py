"""Lifting: the value of one element of a mirror tensor as an index expression.

``Lifter.element(node, index)`` pulls an index backwards through the graph. Rules for single operations register themselves with
:func:`rule`; an operation without a rule is a leaf, an element loaded from the tensor as the model computed it. So lifting can
never be wrong by not knowing an operation, only less informed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.integer_functions import foreign
from attnfx.algebra.integers import Ranges, floordiv, modulo
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.mirror import Mirror, as_sympy, is_tensor, sizes
from attnfx.patterns.order import decisive

if TYPE_CHECKING:
    from attnfx.patterns.learned import Learned

Index = tuple[Expr, ...]
Rule = Callable[["Lifter", fx.Node, Index], Expr | None]

_RULES: dict[str, Rule] = {}
#: Operations that only move elements about; the axes of q, k and v are followed through these alone.
_MOVES: dict[str, Rule] = {}
#: Operations that have a formula in masks and biases only: scores and probabilities are not followed through them.
_APART: set[str] = set()


def rule(*operations: str, moves: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, named without overload: ``rule("aten.expand")``."""

    def register(function: Rule) -> Rule:
        for operation in operations:
            _RULES[operation] = function
            if moves:
                _MOVES[operation] = function
        return function

    return register


def position_rule(*operations: str) -> Callable[[Rule], Rule]:
    """Register a rule for what is made of positions and data that nobody learns: its result stays data where it has a
    gradient, or holds products of tensors or what the lifter does not look behind."""

    def register(function: Rule) -> Rule:
        def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
            if lifter.mirror.requires_grad(node):
                return None
            found = function(lifter, node, index)
            if found is None or any(isinstance(n, Load) and lifter.followed(n) for n in expr.walk(found)):
                return None
            return found

        for operation in operations:
            _RULES[operation] = apply
            _APART.add(operation)
        return function

    return register


Unpack = Callable[["Lifter", fx.Node, int, Index], Expr | None]
_UNPACKED: dict[str, Unpack] = {}


def unpacking_rule(*operations: str) -> Callable[[Unpack], Unpack]:
    """Register a :func:`position_rule` for result ``which`` of operations with several."""

    def register(function: Unpack) -> Unpack:
        _UNPACKED.update(dict.fromkeys(operations, function))
        return function

    return register


def unpacked(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """The element of ``node``, a result of an operation with a rule of :func:`unpacking_rule`."""
    source, which = node.args
    function = _UNPACKED.get(operation(source)) if isinstance(source, fx.Node) and isinstance(which, int) else None
    if function is None or lifter.mirror.requires_grad(node):
        return None
    found = function(lifter, source, which, index)  # type: ignore[arg-type]
    return None if found is None or any(isinstance(n, Load) and lifter.followed(n) for n in expr.walk(found)) else found


def has_rule(node: fx.Node) -> bool:
    """Whether scores and probabilities are followed through ``node``: an element is a formula of its operands' elements."""
    return operation(node) in _RULES and operation(node) not in _APART


def operation(node: fx.Node) -> str:
    """The name of a node's ATen operation without overload, or ''; one that writes its result into ``out=`` has none."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and "out" not in node.kwargs:
        return str(target.overloadpacket)
    return "_operator.getitem" if target is operator.getitem else ""


def _written_number(maker: fx.Node) -> Any:
    """The number that a Dynamo node turns into a constant tensor."""
    if maker.target is torch.tensor:
        return maker.args[0]
    if maker.target is not operator.setitem:
        return None
    places = maker.args[1] if isinstance(maker.args[1], tuple) else (maker.args[1],)
    plain = all(p is None or p is Ellipsis or isinstance(p, slice | fx.Node) or type(p) is int for p in places)
    return maker.args[2] if plain else None


@dataclass(frozen=True)
class Dot:
    """Slot of a load that is a contraction: ``node`` computes ``sum_t left[.., t] right[.., t]``, times nothing."""

    node: fx.Node


class Lifter:
    """Pulls indices through one mirror. ``ranges`` bounds the index symbols in use.

    ``at``: the node for which elements are read; ``inner``: the symbols of queries and keys; ``stop``: a node that is not
    looked behind; ``course``: nodes that are always looked
    behind, their dropout as if it dropped nothing; ``learned``: which nodes that autograd follows are data.
    """

    #: Operations that are data to a kind of lifter, although there is a rule for them.
    taken_whole: frozenset[str] = frozenset()
    #: Whether no sum is written out in another order of additions than the model's.
    ordered = False

    def __init__(
        self,
        mirror: Mirror,
        ranges: Ranges,
        *,
        at: fx.Node,
        inner: tuple[sympy.Symbol, sympy.Symbol] | None = None,
        stop: fx.Node | None = None,
        course: frozenset[fx.Node] = frozenset(),
        learned: Learned | None = None,
    ) -> None:
        self.mirror = mirror
        self.stop = stop
        self.course = course
        self.learned = learned
        self.ranges = ranges
        self.at = at
        self.inner = inner
        self.reader = at

    @cached_property
    def memo(self) -> dict[tuple[fx.Node, Index, fx.Node | None], Expr]:
        """What was lifted so far, shared by all lifters of the mirror that would lift the same: equal layers read one mask."""
        if type(self) is not Lifter:
            return {}  # it has rules of its own
        how = (self.known, self.inner, self.stop, self.course, self.learned, self.mirror.outlook(self.at))
        return self.mirror.lifted.setdefault(how, {})

    @cached_property
    def known(self) -> Hashable:
        """The ranges as a key."""
        return tuple(tuple(sorted(bounds.items(), key=str)) for bounds in (self.ranges.low, self.ranges.high))

    def element(self, node: Any, index: Index) -> Expr:
        """Element ``index`` of a mirror node as the reader finds it, or a number as itself. Raises Stale where in-place writes
        make that unreadable."""
        if not isinstance(node, fx.Node):
            return self.literal(node)
        if not is_tensor(node):
            return self.scalar(node)
        writers = self.mirror.writers(node, self.mirror.position[node] + 1, self.mirror.position[self.reader])
        key = (node, index, writers[-1] if writers else None)
        if key not in self.memo:
            if writers:
                from attnfx.patterns.versions import element_as_read

                self.memo[key] = element_as_read(self, node, index, writers[-1])
            else:
                self.memo[key] = self._element(node, index)
        return self.memo[key]

    def _element(self, node: fx.Node, index: Index) -> Expr:
        leaf = Load(node, index, node.meta["val"].dtype)
        if node is self.stop:
            return leaf
        if node.op == "placeholder":
            return self._table(node, index) or leaf
        if node.op == "get_attr":
            return self._literal(node, index) or leaf
        apply = _RULES.get(operation(node))
        if apply is None or self.severed(node) or operation(node) in self.taken_whole:
            return leaf
        reader, self.reader = self.reader, node
        try:
            found = apply(self, node, index)
            if found is not None and decisive(found):
                found = self._in_order(node, apply, index)
        except NoNumber:
            found = None
        finally:
            self.reader = reader
        if found is None:
            return leaf
        loadable = node not in self.course and not self.mirror.overwritten(node, self.at)
        if loadable and self.learned is not None and self.learned.is_data(self.mirror, node, found):
            return leaf
        return leaf if loadable and self.worth_loading(found, index) else found

    def _in_order(self, node: fx.Node, apply: Rule, index: Index) -> Expr | None:
        """The element of an operation for which last bits decide: predicates are data, others are formulas of sums that are."""
        if node.meta["val"].dtype == torch.bool:
            return None
        memo, self.memo, self.ordered = self.memo, {}, True
        try:
            found = apply(self, node, index)
        finally:
            self.memo, self.ordered = memo, False
        return None if found is None or decisive(found) else found

    def _table(self, node: fx.Node, index: Index) -> Expr | None:
        """The element of an input whose values are known and have a formula."""
        table = self.mirror.tables.get(node)
        return None if table is None else table.element(index, self.less)

    def _literal(self, node: fx.Node, index: Index) -> Expr | None:
        """The number in a ``torch.tensor(numbers)`` or ``x[part] = number`` of the user's code; other attributes may change
        and are data."""
        maker = self.mirror.origin.get(node)
        number = None if maker is None else _written_number(maker)
        for at, size in zip(index, sizes(node), strict=True):
            if not (isinstance(at, Int) and at.value.is_Integer and isinstance(number, list | tuple) and size == len(number)):
                return None
            number = number[int(at.value)]
        if not isinstance(number, bool | int | float) or number != number:
            return None
        return expr.constant(number, node.meta["val"].dtype)

    def followed(self, load: Load) -> bool:
        """Whether ``load`` reads scores or probabilities."""
        return isinstance(load.slot, Dot) or (self.stop is not None and load.slot is self.stop)

    def worth_loading(self, found: Expr, index: Index) -> bool:
        """Whether an element is better loaded from the model's own tensor than computed by its formula ``found``."""
        # A tensor without both i and j is small and already computed by the model: loading it is exact and cheap.
        # Integer formulas without loads stay formulas, since facts are proved from them, and so do they as floats.
        if self.inner is None or any(isinstance(n, Load) and isinstance(n.slot, Dot) for n in expr.walk(found)):
            return False
        used = frozenset().union(*(expr.symbols(x) for x in index)) if index else frozenset()
        if all(s in used for s in self.inner):
            return False
        return any(isinstance(n, Load) or _rounds(n) for n in expr.walk(found))

    def literal(self, value: Any) -> Expr:
        """A Python number, not rounded yet: the operation that reads it decides its dtype."""
        if not isinstance(value, float):
            return expr.lift(value)
        if value != value:
            raise NoNumber("NaN has no formula")
        return expr.constant(value, torch.float64)

    def severed(self, node: fx.Node) -> bool:
        """Whether following ``node`` would send a gradient where the model sends none."""
        return self.mirror.severed(node) and self.mirror.requires_grad(self.at)

    def scalar(self, node: fx.Node) -> Expr:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return Int(expressible(as_sympy(value)))
        if isinstance(value, torch.SymFloat):
            return Load(node, (), torch.float64)
        raise Stale(f"{node.name} is not a number that can be read from the graph")

    def moved(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """One step back through an operation that only moves elements; None where ``node`` is something else."""
        apply = _MOVES.get(operation(node))
        if apply is None or self.severed(node):
            return None
        step = _Step(self.mirror, self.ranges, at=self.at)
        try:
            apply(step, node, index)
        except NoNumber:
            return None
        return step.found

    # Arithmetic on indices, with what is known of their ranges.

    def floordiv(self, a: Expr, b: sympy.Expr) -> Expr:
        if b == 1:
            return a
        return Int(floordiv(a.value, b, self.ranges)) if isinstance(a, Int) else expr.call("floordiv", a, Int(b))

    def modulo(self, a: Expr, b: sympy.Expr) -> Expr:
        if b == 1:
            return expr.integer(0)
        return Int(modulo(a.value, b, self.ranges)) if isinstance(a, Int) else expr.call("mod", a, Int(b))

    def less(self, a: Expr, b: Expr) -> Expr:
        """``a < b``, decided where the ranges decide it."""
        if isinstance(a, Int) and isinstance(b, Int):
            if self.ranges.nonnegative(b.value - a.value - 1):
                return expr.TRUE
            if self.ranges.nonnegative(a.value - b.value):
                return expr.FALSE
        return expr.lt(a, b)

    def broadcast(self, operand: Any, index: Index) -> Expr:
        """Element of an operand of an element-wise operation whose result has index ``index``."""
        if not is_tensor(operand):
            return self.element(operand, ())
        shape = sizes(operand)
        aligned = index[len(index) - len(shape) :]
        picked = tuple(expr.integer(0) if size == 1 else at for size, at in zip(shape, aligned, strict=True))
        return self.element(operand, picked)


def _rounds(e: Expr) -> bool:
    """Whether ``e`` is a step in floating point, other than a whole number read as a float."""
    whole = isinstance(e, expr.Call) and e.op == "cast" and not e.args[0].dtype.is_floating_point
    return isinstance(e, expr.Call) and e.dtype.is_floating_point and not whole


class Stale(Exception):
    """The past value of a tensor cannot be read any more."""


class NoNumber(Stale):
    """A number that no formula can carry: the operation that reads it stays a leaf, a write that reads it cannot be followed."""


def expressible(e: sympy.Expr) -> sympy.Expr:
    """``e``, an integer that a formula can carry. Raises NoNumber."""
    if name := foreign(e):
        raise NoNumber(f"the integer {e} has the function {name}, which no formula here carries")
    return e


class _Step(Lifter):
    """A lifter that records the first element asked for instead of following it."""

    found: tuple[fx.Node, Index] | None = None

    def element(self, node: Any, index: Index) -> Expr:
        if self.found is None and is_tensor(node):
            self.found = (node, index)
        return expr.integer(0)
