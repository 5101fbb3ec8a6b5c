"""What a pattern hands to the matcher: a normaliser, its logits, and the contraction with the values behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import sympy
from torch import fx

from attnfx.expr import Expr
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.lift import Index, Lifter


class Refused(Exception):
    """This is not attention, or not one that can be rewritten exactly; the message is the reason, a sentence."""


@dataclass(frozen=True)
class Layout:
    """The atoms of every canonical axis: batch, key head and group symbols, then query, key, head_dim and value_dim symbols.

    ``beside``: further axes of the values' own (the coordinates of points), folded with ``dv`` into one.
    """

    batch: tuple[sympy.Symbol, ...]
    heads: tuple[sympy.Symbol, ...]
    groups: tuple[sympy.Symbol, ...]
    i: sympy.Symbol
    j: sympy.Symbol
    d: sympy.Symbol
    dv: sympy.Symbol
    beside: tuple[sympy.Symbol, ...] = ()

    @property
    def width(self) -> tuple[sympy.Symbol, ...]:
        """All axes of the values' own."""
        return (*self.beside, self.dv)


@dataclass(frozen=True)
class Candidate:
    """A possible attention.

    ``probabilities(lifter, index, t)``: what the result's element ``index`` multiplies the values by along the summation
    index ``t``: an expression with the normaliser's own result as a load. ``logits(lifter, index)``: the logits there.
    ``values(lifter, index, t)``: where it reads the values. ``axis``: the normalised axis of the logits; ``length``: its size;
    ``summed``: the size of the axis that the values are summed over.
    ``also``: who else reads the probabilities, so that the model goes on computing them.
    ``rows``: where nothing divides the exponentials, their row sums ("sum") and the row maxima that were taken off ("max"), as
    far as the model reads them: the attention gives these too, where ``first`` of their readers stands before the output.
    ``scores``: products that one new product stands for.
    """

    pattern: str
    normaliser: fx.Node
    output: fx.Node
    axis: int
    length: sympy.Expr
    summed: sympy.Expr
    logits: Callable[[Lifter, Index], Expr]
    probabilities: Callable[[Lifter, Index, Expr], Expr]
    values: Callable[[Lifter, Index, Expr], tuple[fx.Node, Index]]
    empty_rows: str
    dropout: float = 0.0
    consumed: frozenset[fx.Node] = field(default_factory=frozenset)
    also: str = ""
    rows: tuple[tuple[str, fx.Node], ...] = ()
    first: fx.Node | None = None
    scores: frozenset[fx.Node] = frozenset()


#: A pattern: every candidate of a mirror, or for each look-alike the node and why it is none.
Finder = Callable[[Mirror], Iterator["Candidate | tuple[fx.Node, str]"]]
