"""Which meaning each axis of an operand has: batch and head atoms, query i, key j, head_dim d.

Nothing here looks at the order of axes. An operand's index, written in the index symbols of the attention's result, says
which symbol each
of its axes carries; a head axis that appears as ``h // G`` is a shared key head; a folded axis is a mixed-radix sum of symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import fx
from torch.utils._sympy.functions import PythonMod

from attnfx.algebra.integers import FloorDiv, Mod, Ranges, replace
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.candidate import Refused
from attnfx.patterns.lift import Index, Lifter, operation
from attnfx.patterns.versions import Past, as_read, hidden_by, obtainable

#: The axes folded into one axis of a tensor, outermost first; empty for an axis of size one.
Axis = tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class Operand:
    """A mirror node whose axes are all understood: ``axes[k]`` are the symbols folded into axis k.

    ``after``: the last write to its memory before it is read, None where there is none.
    """

    node: fx.Node
    axes: tuple[Axis, ...]
    after: fx.Node | None = None

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        return frozenset(s for axis in self.axes for s in axis)


@dataclass(frozen=True)
class Extents:
    """The size of every index symbol in use."""

    sizes: Mapping[sympy.Symbol, sympy.Expr]
    known: Ranges

    @property
    def ranges(self) -> Ranges:
        zero = dict.fromkeys(self.sizes, sympy.Integer(0))
        return Ranges({**self.known.low, **zero}, {**self.known.high, **{s: n - 1 for s, n in self.sizes.items()}})

    def split(self, symbol: sympy.Symbol, by: sympy.Expr) -> tuple[Extents, sympy.Expr]:
        """``symbol`` replaced by ``by * outer + inner``: the new extents, and that sum."""
        outer, inner = (sympy.Symbol(f"{symbol}{part}", integer=True, nonnegative=True) for part in "ab")
        rest = {s: n for s, n in self.sizes.items() if s != symbol}
        return Extents({**rest, outer: sympy.cancel(self.sizes[symbol] / by), inner: by}, self.known), by * outer + inner


def understood(node: fx.Node, index: Index, extents: Extents, alone: frozenset[sympy.Symbol]) -> Operand | None:
    """``node`` at ``index`` as an operand, or None where an axis is sliced, strided or mixed. ``alone``: symbols that
    may not be folded."""
    axes = []
    for size, at in zip(sizes(node), index, strict=True):
        axis = _axis(at, size, extents)
        if axis is None or (len(axis) > 1 and alone.intersection(axis)):
            return None
        axes.append(axis)
    seen = [s for axis in axes for s in axis]
    return Operand(node, tuple(axes)) if len(seen) == len(set(seen)) else None


def _axis(at: Expr, size: sympy.Expr, extents: Extents) -> Axis | None:
    if not isinstance(at, Int):
        return None
    if at.value == 0:
        return () if size == 1 else None
    terms: list[tuple[sympy.Expr, sympy.Symbol]] = []
    for term in sympy.Add.make_args(sympy.expand(at.value)):
        inside = [s for s in term.free_symbols if s in extents.sizes]
        if len(inside) != 1:
            return None
        stride = sympy.cancel(term / inside[0])
        if inside[0] in stride.free_symbols:
            return None
        terms.append((stride, inside[0]))
    ordered: list[sympy.Symbol] = []
    reached = sympy.Integer(1)
    while terms:
        following = next((t for t in terms if sympy.expand(t[0] - reached) == 0), None)
        if following is None:
            return None
        terms.remove(following)
        ordered.insert(0, following[1])
        reached = sympy.expand(reached * extents.sizes[following[1]])
    return tuple(ordered) if sympy.expand(reached - size) == 0 else None


def history(lifter: Lifter, node: fx.Node, index: Index, reader: fx.Node) -> list[tuple[fx.Node, Index]]:
    """``node`` at ``index`` as ``reader`` finds it, and what it was before each operation that only moved elements,
    newest first. A copy that was written to is not what it was copied from: the history ends there."""
    known = tuple(Int(replace(x.value, {}, lifter.ranges)) if isinstance(x, Int) else x for x in index)
    steps = [(node, known)]
    while (step := lifter.moved(*steps[-1])) is not None:
        newer, older = steps[-1][0], step[0]
        if lifter.mirror.storage.get(older) != lifter.mirror.storage.get(newer):
            if as_read(lifter.mirror, newer, reader).after is not newer:
                break
            reader = newer
        steps.append(step)
    return steps


def rooted(
    mirror: Mirror,
    side: Sequence[tuple[fx.Node, Index]],
    reader: fx.Node,
    until: fx.Node,
    extents: Extents,
    alone: frozenset[sympy.Symbol],
    name: str,
) -> Operand:
    """The oldest form in a history that ``reader`` starts whose axes are all understood, if possible one that no write
    before ``until`` hides. Raises Refused where there is none."""
    known: list[tuple[Operand, Past]] = []
    for (node, at), (older, _) in zip(side, [*side[1:], side[-1]], strict=True):
        form, past = understood(node, at, extents, alone), as_read(mirror, node, reader)
        if form is not None:
            known.insert(0, (form, past))
        if mirror.storage.get(older) != mirror.storage.get(node):
            reader = node
    if not known:
        raise Refused(f"the axes of the {name} ({side[0][0].name}) cannot be told apart")
    held = [(form, past) for form, past in known if obtainable(mirror, past, until)]
    if not held:
        raise Refused(f"the {name} ({known[0][1].name}) are changed in place before the attention is computed")
    form, past = next(((f, p) for f, p in held if hidden_by(mirror, p, until) is None), held[0])
    return Operand(form.node, form.axes, past.after)


def divisors(indices: Iterable[Expr], extents: Extents) -> tuple[sympy.Symbol, sympy.Expr] | None:
    """A symbol that some index divides, and by what: the axis is a fold of two."""
    for at in indices:
        if not isinstance(at, Int):
            continue
        for atom in sorted(at.value.atoms(FloorDiv, Mod, PythonMod), key=str):
            base, by = atom.args
            if base in extents.sizes and not (by.free_symbols & set(extents.sizes)):
                whole = sympy.cancel(extents.sizes[base] / by)
                if whole != 1 and (whole.is_Integer or whole.is_integer):
                    return base, by
    return None


def through_scaling(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``x, c`` where ``node`` is ``x * c`` or ``x / c`` with a number c."""
    if operation(node) not in ("aten.mul", "aten.div") or len(node.args) < 2 or node.kwargs.get("rounding_mode"):
        return None
    x, c = node.args[:2]
    if not isinstance(c, int | float) or isinstance(c, bool) or not is_tensor(x):
        return None
    assert isinstance(x, fx.Node)
    if c == 0 or c != c or abs(c) == float("inf"):
        return None
    return x, float(c) if operation(node) == "aten.mul" else 1.0 / float(c)
