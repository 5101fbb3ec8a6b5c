"""Products: one element of a tensor as a sum over indices of a product of other tensors' elements, whatever made it.

Matrix products, einsums of any number of operands, multiplications, sums, means, running sums, masks and divisions all become
one :class:`Product`. So ``f(q) (f(k)^T v)`` and ``(f(q) f(k)^T) v`` are the same thing, in any association and any spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.mirror import Mirror, as_sympy, is_tensor, sizes
from attnfx.patterns.axes import Extents
from attnfx.patterns.equations import letters
from attnfx.patterns.lift import _MOVES, _RULES, Index, Lifter, Stale, operation
from attnfx.patterns.lift_moves import argument, integer_of

CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.half")
_MATRIX = ("aten.matmul", "aten.bmm", "aten.mm")
#: Operations that sum products over an axis; a running sum is one with a predicate.
_SUMS = (*_MATRIX, "aten.sum", "aten.mean", "aten.cumsum")


@dataclass(frozen=True)
class Factor:
    """One element in a product. ``steps``: the tensor it is read from and what that was before each operation that only moved
    elements, newest first. ``within``: the outermost multiplication that it stands in since the last sum, or None."""

    steps: tuple[tuple[fx.Node, Index], ...]
    within: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        return self.steps[-1][0]

    @property
    def index(self) -> Index:
        return self.steps[-1][1]

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        return frozenset().union(*(expr.symbols(x) for x in self.index))


@dataclass(frozen=True)
class Divisor:
    """``node`` at ``index`` divides the product, at the node ``at``."""

    node: fx.Node
    index: Index
    at: fx.Node


@dataclass(frozen=True)
class Product:
    """``coefficient * sum over sums of (all keeps hold) * product of factors / product of divisors``."""

    coefficient: sympy.Expr = sympy.S.One
    factors: tuple[Factor, ...] = ()
    divisors: tuple[Divisor, ...] = ()
    sums: tuple[sympy.Symbol, ...] = ()
    keeps: tuple[Expr, ...] = ()

    def __mul__(self, other: Product) -> Product:
        return Product(
            self.coefficient * other.coefficient, self.factors + other.factors, self.divisors + other.divisors,
            self.sums + other.sums, self.keeps + other.keeps,
        )  # fmt: skip


def sums_of(node: fx.Node) -> bool:
    """Whether ``node`` sums products over at least one axis."""
    name = operation(node)
    if name == "aten.einsum":
        return (found := letters(node)) is not None and bool(set("".join(found[0])) - set(found[1]))
    return name in _SUMS and (name != "aten.sum" or len(node.args) > 0)


class Expander:
    """Expands elements of a mirror's tensors into products. ``opened``: which sums are looked into (None: all of them);
    ``atoms``: value numbers of nodes that are taken as they are."""

    def __init__(
        self, mirror: Mirror, extents: Extents, lifter: Lifter, number: Callable[[fx.Node], int],
        opened: frozenset[fx.Node] | None, atoms: frozenset[int],
    ) -> None:  # fmt: skip
        self.mirror, self.extents, self.lifter, self.number = mirror, extents, lifter, number
        self.opened, self.atoms = opened, atoms
        self.closed: list[fx.Node] = []
        self.looked: dict[fx.Node, Index] = {}
        self.made = 0

    def expand(
        self, node: fx.Node, index: Index, steps: tuple[tuple[fx.Node, Index], ...] = (), within: fx.Node | None = None
    ) -> Product:
        """Element ``index`` of ``node`` as a product. Raises Stale for memory that was written in between."""
        if self.mirror.overwritten(node, self.lifter.at):
            if not steps:
                raise Stale(f"{node.name} is changed in place before {self.lifter.at.name} reads it")
            return Product(factors=(Factor(steps, within),))
        steps = (*steps, (node, index))
        here = Product(factors=(Factor(steps, within),))
        if self.number(node) in self.atoms or not node.meta["val"].is_floating_point() or self.lifter.severed(node):
            return here
        name = operation(node)
        summing = sums_of(node)
        if summing and self.opened is not None and node not in self.opened:
            self.closed.append(node)
            return here
        if summing:
            self.looked[node] = index
        if summing or (name == "aten.einsum" and letters(node) is not None):
            return self._sum(node, index) or here
        if name in _MOVES and not self._bits(node):
            step = self.lifter.moved(node, index)
            return here if step is None else self.expand(*step, steps, within)
        if name in CASTS and is_tensor(node.args[0]) and self._keeps_value(node):
            return self.expand(node.args[0], index, steps, within)  # type: ignore[arg-type]
        tensors = sum(is_tensor(a) for a in node.args[:3])
        found = self._elementwise(node, name, index, within or node if tensors > 1 else within)
        return here if found is None else found

    def _bits(self, node: fx.Node) -> bool:
        return isinstance(argument(node, 1, "dtype"), torch.dtype) and operation(node) == "aten.view"

    def _keeps_value(self, node: fx.Node) -> bool:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = source.meta["val"], node.meta["val"]
        return bool(_wide(before) and _wide(after) and before.device == after.device)

    # Elementwise ----------------------------------------------------------------------------------------------------------

    def _elementwise(self, node: fx.Node, name: str, index: Index, within: fx.Node | None) -> Product | None:
        match name:
            case "aten.mul" | "aten.mul_":
                a, b = (self._operand(x, index, within) for x in node.args[:2])
                return a * b if a is not None and b is not None else None
            case "aten.div" | "aten.div_" | "aten.true_divide" if not node.kwargs.get("rounding_mode"):
                return self._divided(node, index, within)
            case "aten.add" if any(number(x) == 0 for x in node.args[:2]):  # where a loop over chunks begins
                return self._operand(node.args[1 if number(node.args[0]) == 0 else 0], index, within)
            case "aten.neg":
                found = self._operand(node.args[0], index, within)
                return None if found is None else replace(found, coefficient=-found.coefficient)
            case "aten.reciprocal":
                return Product(divisors=(Divisor(node.args[0], index, node),))  # type: ignore[arg-type]
            case "aten.pow" if node.args[1] == -1:
                return Product(divisors=(Divisor(node.args[0], index, node),))  # type: ignore[arg-type]
            case "aten.masked_fill" | "aten.masked_fill_" if node.args[2] == 0:
                kept = expr.logical_not(expr.cast(self.lifter.broadcast(node.args[1], index), torch.bool))
                return self._masked(node.args[0], index, within, kept)
            case "aten.where" if len(node.args) == 3:
                condition = expr.cast(self.lifter.broadcast(node.args[0], index), torch.bool)
                for x, other, kept in ((1, 2, condition), (2, 1, expr.logical_not(condition))):
                    if is_tensor(node.args[x]) and self._zero(node.args[other], index):
                        return self._masked(node.args[x], index, within, kept)
                return None
            case "aten.tril" | "aten.triu" | "aten.tril_" | "aten.triu_":
                diagonal = Int(integer_of(argument(node, 1, "diagonal", 0)))
                row, column = index[-2:]
                lower = name.startswith("aten.tril")
                kept = expr.le(column, row + diagonal) if lower else expr.le(row + diagonal, column)
                return self._masked(node.args[0], index, within, kept)
            case "aten.constant_pad_nd" | "aten.pad" | "aten.cat":
                return self._pieced(node, name, index, within)
            case "aten.dropout" if not argument(node, 2, "train", False):
                return self._operand(node.args[0], index, within)
        return None

    def _zero(self, x: object, index: Index) -> bool:
        return expr.is_number(self.lifter.broadcast(x, index), 0)

    def _masked(self, source: object, index: Index, within: fx.Node | None, kept: Expr) -> Product | None:
        found = self._operand(source, index, within)
        return None if found is None else replace(found, keeps=(*found.keeps, kept))

    def _operand(self, x: object, index: Index, within: fx.Node | None) -> Product | None:
        if (c := number(x)) is not None:
            return Product(coefficient=c)
        return self.expand(x, aligned(x, index), (), within) if is_tensor(x) else None  # type: ignore[arg-type]

    def _divided(self, node: fx.Node, index: Index, within: fx.Node | None) -> Product | None:
        above, below = node.args[:2]
        found = self._operand(above, index, within)
        if found is None or (c := number(below)) == 0:
            return None
        if c is not None:
            return replace(found, coefficient=found.coefficient / c)
        if not is_tensor(below):
            return None
        return found * Product(divisors=(Divisor(below, aligned(below, index), node),))  # type: ignore[arg-type]

    def _pieced(self, node: fx.Node, name: str, index: Index, within: fx.Node | None) -> Product | None:
        """A padded or joined tensor where it is proved which piece the element is in (a column of ones beside the values)."""
        found = _RULES[name](_Shallow(self.mirror, self.extents.ranges, at=self.lifter.at), node, index)
        if isinstance(found, Load) and isinstance(found.slot, fx.Node):
            return self.expand(found.slot, found.indices, (), within)
        if isinstance(found, expr.Const) and not isinstance(found.value, bool) and math.isfinite(found.value):
            return Product(coefficient=_rational(found.value))
        return None

    # Sums -----------------------------------------------------------------------------------------------------------------

    def _symbol(self, size: sympy.Expr) -> Int:
        """A new index below ``size``; an axis of size one has the index 0."""
        if size == 1:
            return Int(sympy.Integer(0))
        self.made += 1
        s = sympy.Symbol(f"t{self.made}", integer=True, nonnegative=True)
        self.extents = Extents({**self.extents.sizes, s: size}, self.extents.known)
        self.lifter.ranges = self.extents.ranges
        return Int(s)

    def _sum(self, node: fx.Node, index: Index) -> Product | None:
        name = operation(node)
        if name == "aten.einsum":
            return self._einsum(node, index)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if name in _MATRIX:
            right = node.args[1]
            assert isinstance(right, fx.Node)
            if min(len(sizes(source)), len(sizes(right))) < 2:
                return None
            t = self._symbol(sizes(source)[-1])
            lead = [aligned_axes(sizes(x)[:-2], index[:-2]) for x in (source, right)]
            sides = self.expand(source, (*lead[0], index[-2], t)) * self.expand(right, (*lead[1], t, index[-1]))
            return replace(sides, sums=(*sides.sums, *_free(t)))
        shape = sizes(source)
        if name == "aten.cumsum":
            d = int(argument(node, 1, "dim")) % len(shape)
            t = self._symbol(shape[d])
            found = self.expand(source, (*index[:d], t, *index[d + 1 :]))
            return replace(found, sums=(*found.sums, *_free(t)), keeps=(*found.keeps, expr.le(t, index[d])))
        given = argument(node, 1, "dim")
        dims = range(len(shape)) if given is None or given == [] else [given] if isinstance(given, int) else given
        summed = {int(d) % len(shape) for d in dims}
        kept = iter(index)
        at: list[Expr] = []
        for d, n in enumerate(shape):
            if d in summed:
                if argument(node, 2, "keepdim", False):
                    next(kept)
                at.append(self._symbol(n))
            else:
                at.append(next(kept))
        found = self.expand(source, tuple(at))
        new = tuple(s for d in sorted(summed) for s in _free(at[d]))
        scale = sympy.Mul(*(shape[d] for d in summed)) if name == "aten.mean" else sympy.Integer(1)
        return replace(found, sums=(*found.sums, *new), coefficient=found.coefficient / scale)

    def _einsum(self, node: fx.Node, index: Index) -> Product | None:
        found = letters(node)
        assert found is not None
        inputs, out = found
        operands: list[fx.Node] = list(node.args[1])  # type: ignore[arg-type]
        extent: dict[str, sympy.Expr] = {}
        for given, x in zip(inputs, operands, strict=True):
            for letter, n in zip(given, sizes(x), strict=True):
                extent[letter] = n if extent.get(letter, 1) == 1 else extent[letter]
        at: dict[str, Expr] = dict(zip(out, index, strict=True))
        new = {x: self._symbol(extent[x]) for x in dict.fromkeys("".join(inputs)) if x not in at}
        at.update(new)
        total = Product(sums=tuple(s for t in new.values() for s in _free(t)))
        for given, x in zip(inputs, operands, strict=True):
            where = tuple(expr.integer(0) if n == 1 else at[letter] for letter, n in zip(given, sizes(x), strict=True))
            total = total * self.expand(x, where)
        return total


def _free(t: Expr) -> tuple[sympy.Symbol, ...]:
    return (t.value,) if isinstance(t, Int) and t.value.is_Symbol else ()


class _Shallow(Lifter):
    """A lifter that looks one operation back."""

    def element(self, node: object, index: Index) -> Expr:
        return Load(node, index, node.meta["val"].dtype) if is_tensor(node) else self.literal(node)  # type: ignore[attr-defined]


def _wide(value: torch.Tensor) -> bool:
    return bool(value.is_floating_point() and value.dtype.itemsize >= 2)


def aligned(x: object, index: Index) -> Index:
    """The index of an operand of an element-wise operation whose result has ``index``."""
    assert isinstance(x, fx.Node)
    return aligned_axes(sizes(x), index)


def aligned_axes(shape: Iterable[sympy.Expr], index: Index) -> Index:
    shape = tuple(shape)
    return tuple(expr.integer(0) if n == 1 else at for n, at in zip(shape, index[len(index) - len(shape) :], strict=True))


def number(x: object) -> sympy.Expr | None:
    """A Python number or a size as an exact sympy number; None for anything else."""
    if isinstance(x, bool):
        return None
    if isinstance(x, int):
        return sympy.Integer(x)
    if isinstance(x, float):
        return _rational(x) if math.isfinite(x) else None
    if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.SymInt):
        return as_sympy(x.meta["val"])
    return None


def _rational(x: float) -> sympy.Rational:
    exact = Fraction(x)
    return sympy.Rational(exact.numerator, exact.denominator)


def scale(e: Expr, factor: sympy.Expr) -> Expr:
    """``factor * e``; what is a size symbol stays one."""
    factor = sympy.cancel(factor)
    if factor == 1:
        return e
    if factor.is_number:
        value = float(factor)
        return e if abs(value - 1) < 1e-12 else expr.call("mul", e, expr.Const(value, torch.float64), dtype=torch.float32)
    above, below = sympy.fraction(sympy.together(factor))
    e = e if above == 1 else expr.call("mul", e, _size(above), dtype=torch.float32)
    return e if below == 1 else expr.call("div", e, _size(below), dtype=torch.float32)


def _size(e: sympy.Expr) -> Expr:
    return Int(e) if e.is_integer else expr.Const(float(e), torch.float64)
