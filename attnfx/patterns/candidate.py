"""What a pattern hands to the matcher: a normaliser, its logits, and the contraction with the values behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx

from attnfx.capture import Mirror
from attnfx.expr import Expr
from attnfx.patterns.lift import Index, Lifter


class Refused(Exception):
    """This is not attention, or not one that can be rewritten exactly; the message is the reason, a sentence."""


@dataclass(frozen=True)
class Candidate:
    """A possible attention.

    ``weights(index, t)``: where the result's element ``index`` reads the normalised weights along the summation index
    ``t``, as an index into
    the logits. ``logits(lifter, index)``: the logits there. ``values(index, t)``: where it reads the values. ``axis``:
    the normalised axis of the logits.
    """

    pattern: str
    normaliser: fx.Node
    output: fx.Node
    axis: int
    logits: Callable[[Lifter, Index], Expr]
    weights: Callable[[Lifter, Index, Expr], Index]
    values: Callable[[Index, Expr], tuple[fx.Node, Index]]
    empty_rows: str
    dropout: float = 0.0
    consumed: frozenset[fx.Node] = field(default_factory=frozenset)


#: A pattern: every candidate of a mirror, or for each look-alike the node and why it is none.
Finder = Callable[[Mirror], Iterator["Candidate | tuple[fx.Node, str]"]]
