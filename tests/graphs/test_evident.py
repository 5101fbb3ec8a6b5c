"""Inequalities of sizes: proved where they always hold, never where they fail for some size."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max

from attnfx.graphs.evident import evident

S = sympy.Symbol("s", integer=True, positive=True)
BLOCKS = FloorDiv(S + 127, 128)


def lowest(e: sympy.Expr) -> sympy.Integer | None:
    known = {S: 2, BLOCKS: 1, 128 * BLOCKS: 128}
    return sympy.Integer(known[e]) if e in known else None


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (Max(1, 128 * BLOCKS) < Max(1, 128 * BLOCKS) ** 2, True),
        (sympy.Lt(S, S**2, evaluate=False), True),
        (sympy.Gt(S**2, S + 1, evaluate=False), True),
        (sympy.Ne(S, 1, evaluate=False), True),
        (sympy.Ne(1, S, evaluate=False), True),
        (sympy.Lt(BLOCKS, BLOCKS**2, evaluate=False), False),
        (sympy.Lt(S, 3, evaluate=False), False),
        (sympy.Ne(S, 3, evaluate=False), False),
        (sympy.Eq(S, 2, evaluate=False), False),
        (sympy.Lt(sympy.Symbol("unknown", integer=True), S, evaluate=False), False),
    ],
)
def test_claims(claim: sympy.Basic, holds: bool) -> None:
    assert evident(claim, lowest) is holds
