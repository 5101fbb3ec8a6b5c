"""What is added to the scores, as numbers to draw: a computed bias at its positions, or which element of a table is read there."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, integer
from attnfx.expr import Expr, Load, Score
from attnfx.reports.mask_blocks import sample_sizes
from attnfx.site import AttentionSite

_POINTS = 48


@dataclass(frozen=True)
class Bias:
    """``values[i][j]`` at up to 48 queries and keys, evenly chosen, and a sentence that says what they are."""

    values: tuple[tuple[float, ...], ...]
    caption: str


def bias(site: AttentionSite) -> Bias | None:
    """The picture of the first head's bias; None where nothing is added, or nothing of it is computed from positions."""
    zero = expr.rebuild(site.score, lambda n: expr.constant(0.0, n.dtype) if isinstance(n, Score) else None)
    if not _of_positions(zero):
        return None
    loads = [n for n in expr.walk(zero) if isinstance(n, Load)]
    if not loads:
        return _drawn(site, zero, "What is added to the scores", "Blue is below zero, red above")
    tables = [(n, x) for n in loads for x in n.indices if _of_positions(x) and not any(isinstance(m, Load) for m in expr.walk(x))]
    computed = [(n, x) for n, x in tables if not (isinstance(x, expr.Int) and x.value in expr.INDEX.values())]
    if not computed:
        return None
    load, index = computed[0]
    return _drawn(
        site,
        index,
        f"Which element of T{load.slot} is added to the score: its place, computed from i and j",
        "The darker, the later in the table",
    )


def _drawn(site: AttentionSite, e: Expr, caption: str, colours: str) -> Bias | None:
    sizes = sample_sizes(site)
    try:
        queries, keys = (int(integer(sympy.sympify(n), sizes)) for n in (site.queries, site.keys))
        i, j = (torch.linspace(0, n - 1, min(_POINTS, n)).round().long() for n in (queries, keys))
        one = torch.zeros(1, 1, 1, 1, dtype=torch.long)
        grid = {"b": one, "h": one, "i": i.view(1, 1, -1, 1), "j": j.view(1, 1, 1, -1)}
        found = evaluate(e, grid, (), sizes).double().expand(1, 1, len(i), len(j))[0, 0].nan_to_num(0.0, 0.0, 0.0)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    low, high = float(found.min()), float(found.max())
    if low == high:
        return None
    head = ", in head 0" if expr.depends_on(e, "h") else ""
    values = tuple(tuple(line) for line in found.tolist())
    return Bias(values, f"{caption}{head}, at {queries} queries and {keys} keys: from {low:.4g} to {high:.4g}. {colours}.")


def _of_positions(e: Expr) -> bool:
    """Whether a formula is of the key's position, so that the softmax sees it."""
    return expr.depends_on(e, "j")
