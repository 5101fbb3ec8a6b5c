"""The pair representation behind a bias: features of each two tokens of which the bias is a linear function.

AlphaFold's triangle attention adds ``linear(z)[p, i, j, h]`` to its scores, z being the normalised pair representation.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.integers import floordiv, replace
from attnfx.expr import INDEX, Int, Load
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.matcher import Match


@dataclass(frozen=True)
class PairNodes:
    """``node`` (of the mirror) holds the pair representation, ``order`` brings its axes to (P, i, j, channels); batch element b
    reads the one at b // (B / P). ``bias``: the node that the projection makes, whose axes ``order`` brings to (P, i, j, head)."""

    node: fx.Node
    bias: fx.Node
    order: tuple[int, ...]
    channels: int


def pair_behind(mirror: Mirror, match: Match, load: Load) -> PairNodes | str:
    """The pair representation of a bias that is loaded, or why none is at hand, as a part of a sentence."""
    assert isinstance(load.slot, int)
    past, site = match.loads[load.slot], match.site
    made = past.node
    if past.after is not made or made.target is not torch.ops.aten.linear.default:
        return f"{made.name} is no linear projection, whose input the networks could be given"
    source = made.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source) or source not in mirror.dynamo_of:
        return f"the input of {made.name} is inside another operation"
    if not all(isinstance(x, Int) for x in load.indices):
        return "its indices are computed"
    at = [replace(x.value, {}) for x in load.indices if isinstance(x, Int)]
    h, i, j, b = (INDEX[name] for name in "hijb")
    if len(at) != 4 or at[-1] != h or {at.count(i), at.count(j)} != {1}:
        return f"its axes are {', '.join(map(str, at))}; known is one batch axis, the two tokens and, in the end, the heads"
    (place,) = (k for k in range(3) if at[k] not in (i, j))
    shape = sizes(source)
    tokens = {replace(n, {}) for n in (site.queries, site.keys, *(shape[at.index(x)] for x in (i, j)))}
    if len(tokens) != 1:
        return f"its {site.queries} queries and {site.keys} keys are not the tokens of one representation"
    if expr.Int(at[place]) not in (expr.integer(0), expr.integer(floordiv(b, _share(site.batch, shape[place])))):
        return f"its batch axis is read at {at[place]}; known is one representation for each {_share(site.batch, shape[place])}"
    if at[place] == 0 and shape[place] != 1:
        return f"only the first of its {shape[place]} representations is read"
    if not shape[-1].is_Integer:
        return f"its {shape[-1]} channels are not known"
    return PairNodes(source, made, (place, at.index(i), at.index(j), 3), int(shape[-1]))


def _share(batch: sympy.Expr, representations: sympy.Expr) -> sympy.Expr:
    """How many elements of the batch share a representation."""
    return sympy.cancel(replace(batch, {}) / representations)
