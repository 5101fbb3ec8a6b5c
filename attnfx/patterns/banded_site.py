"""The band of a match: looked for in its logits, and laid out as that of a site, with the operands that a splice makes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from attnfx.expr import Expr
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.axes import Axis, Extents, Operand
from attnfx.patterns.bands import ROW, WIDTH, Found, Setting, banded, hides
from attnfx.patterns.candidate import Layout
from attnfx.patterns.lift import Lifter
from attnfx.patterns.program import Program, canonical, narrowed
from attnfx.patterns.unscaled import unscaled
from attnfx.site import SideTensor
from attnfx.sites.band import Band
from attnfx.sites.facts import Facts, prove


@dataclass(frozen=True)
class Laid:
    """A band, and its tensors: what they are in the graph, the axes that they get, and the site's description of them."""

    band: Band
    operands: tuple[tuple[Operand, tuple[Axis, ...]], ...]
    side: tuple[SideTensor, ...]
    extents: Extents


def without_band(
    z: Expr, separated: Callable[[Expr], Program], layout: Layout, extents: Extents, until: fx.Node, lifter: Callable[[], Lifter],
    dtype: torch.dtype,
) -> tuple[Expr, Found | None]:  # fmt: skip
    """Logits ``z``, which ``separated`` takes apart, without their band, and the band; as they are where none of ``dtype`` was
    found, or where a bound of the mask would go with it."""

    def bounds(made: Program) -> Facts:
        return prove(made.keep, extents.sizes[layout.i], extents.sizes[layout.j], extents.known)

    made = separated(z)
    facts = bounds(made)
    atoms = frozenset((*layout.batch, *layout.heads, *layout.groups))
    mirror = lifter().mirror
    setting = Setting(mirror, until, extents, layout.i, layout.j, atoms, facts, made.fill, made.additive, lifter)
    apart = banded(z, setting)
    if apart is None or any(narrowed(x.node.meta["val"].dtype, apart[1].dtype) != dtype for x in (apart[1].left, apart[1].right)):
        return z, None
    left = separated(apart[0])
    alike = (left.fill, left.additive) == (made.fill, made.additive) or hides(left.fill, left.additive)
    same = not facts.delta_low or (alike and set(facts.delta_low) <= set(bounds(left).delta_low))
    return apart if same else (z, None)


def laid(
    found: Found, first: int, query: Operand | None, width: sympy.Symbol, layout: Layout, lifter: Lifter, until: fx.Node,
    dtype: torch.dtype,
) -> Laid:  # fmt: skip
    """The band with side tensors of ``dtype`` from slot ``first`` on. ``query``: the site's queries, with ``width`` for their last
    axis, if a band may share them."""
    left, scale = unscaled(lifter, found.left, until, dtype)
    same = query is not None and (left.node, left.after) == (query.node, query.after)
    shared = same and query is not None and _renamed(left, width).axes == query.axes
    heads = (*layout.heads, *layout.groups)
    batch, each = (group if found.right.symbols.intersection(group) else () for group in (layout.batch, heads))
    made = [] if shared else [(left, (layout.batch, heads, (layout.i,), (WIDTH,)))]
    made.append((found.right, (batch, each, (ROW,), (WIDTH,))))
    mirror, extents = lifter.mirror, found.extents
    band = Band(
        left=None if shared else first, right=first + len(made) - 1, row=canonical(found.row, layout, extents),
        width=int(extents.sizes[WIDTH]), keep=canonical(found.keep, layout, extents), factor=found.factor * scale,
        dtype=found.dtype,
    )  # fmt: skip
    side = tuple(SideTensor(_shape(axes, extents), dtype, _learns(mirror, x, until)) for x, axes in made)
    return Laid(band, tuple(made), side, extents)


def _renamed(operand: Operand, width: sympy.Symbol) -> Operand:
    return replace(operand, axes=tuple(tuple(width if s == WIDTH else s for s in axis) for axis in operand.axes))


def _shape(axes: tuple[Axis, ...], extents: Extents) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.expand(sympy.Mul(*(extents.sizes[s] for s in axis))) for axis in axes)


def _learns(mirror: Mirror, operand: Operand, until: fx.Node) -> bool:
    held = (operand.node, *(() if operand.after is None else (operand.after,)))
    return mirror.requires_grad(until) and any(mirror.requires_grad(n) for n in held)
