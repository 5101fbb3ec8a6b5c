"""The numerical half of the proof of a separation: both sides at random points, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.expr import INDEX, Expr, Load

if TYPE_CHECKING:
    from attnfx.algebra.separation import Separation

SHAPE = {"b": (2, 1, 1, 1), "h": (1, 3, 1, 1), "i": (1, 1, 5, 1), "j": (1, 1, 1, 6)}
AXES = dict(zip("bhij", range(4), strict=True))
TOLERANCE = 1e-9


def agree(e: Expr, found: Separation) -> bool:
    """Whether ``e`` and the parts that were found are the same numbers, as far as rounding to float64 lets one see."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250512)
        grid = {name: torch.randint(0, 200, shape) for name, shape in SHAPE.items()}
        other = found.whole
        sizes = {s: int(torch.randint(1, 200, ())) for e in (e, other) for s in expr.symbols(e) if s not in INDEX.values()}
        known: dict[Expr, Tensor] = {n: _data(n) for side in (e, other) for n in expr.walk(side) if isinstance(n, Load)}

        def value(side: Expr) -> Tensor:
            return evaluate(side, grid, (), sizes, dtype=torch.float64, known=known)

        want, parts = value(e), [u * v for u, v in ((value(u), value(v)) for u, v in found.terms)]
        parts += [value(x) for x in (found.per_key, found.row_constant) if x is not None]
        zero = torch.zeros((), dtype=torch.float64)
        error = (want - sum(parts, zero)).abs()
        return bool((error <= TOLERANCE * sum((p.abs() for p in parts), zero).clamp_min(1.0)).all())


def _data(load: Load) -> Tensor:
    """Random numbers in the place of data, one for each value of the indices that the load depends on; deterministic for a load."""
    shape = [max(SHAPE[name]) if expr.depends_on(load, name) else 1 for name in AXES]
    if load.dtype.is_floating_point:
        return torch.rand(shape, dtype=torch.float64) + 0.5
    return torch.randint(0, 2, shape).to(load.dtype) if load.dtype == torch.bool else torch.randint(0, 9, shape)
