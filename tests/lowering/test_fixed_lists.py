"""Lists of tiles that are constants of a graph: when they are, and that kernels walk them."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
from interpreted import check
from lowering_sites import H, I, J, load, side, site

from attnfx import expr
from attnfx.lowering import blocks, fixed_lists
from attnfx.lowering.fixed_lists import fixed
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite

NAMES = [
    f"{name}{end}" for name in ("blocks", "blocks of each head", "neighbours", "neighbours and text") for end in ("", ", trained")
]
TABLE = torch.eye(32, dtype=torch.bool).expand(4, -1, -1)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_kernels_walk_them(name: str) -> None:
    check(Path(__file__).parent / "fixed_lists_script.py", name, tolerance=1e-4)


def of_table(**changes: object) -> AttentionSite:
    """A mask of blocks of 64, for each head, which a side tensor holds."""
    block = expr.integer(64)
    keep = load(0, H, expr.floordiv(I, block), expr.floordiv(J, block), dtype=torch.bool)
    sizes = {"queries": 2048, "keys": 2048, "side": (side(4, 32, 32, dtype=torch.bool),), "empty_rows": "zero"}
    return site(keep=keep, **{**sizes, **changes})


def lists(s: AttentionSite, table: torch.Tensor | None = TABLE) -> int:
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan), plan
    return len(fixed(plan, [table]))


def test_those_that_hang_on_the_call_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lists(of_table()) == 0  # there are no kernels here
    monkeypatch.setattr(fixed_lists, "_runs", lambda device: True)
    monkeypatch.setattr(blocks, "build", lambda *args: torch.zeros(1))
    assert lists(of_table()) == 2
    assert lists(of_table(requires_grad=False)) == 1
    assert lists(of_table(), None) == 0
    assert lists(of_table(queries=sympy.Symbol("s0", integer=True, positive=True))) == 0
    assert lists(of_table(heads=sympy.Symbol("s0", integer=True, positive=True))) == 0
    assert lists(of_table(queries=16)) == 0
    monkeypatch.setattr(fixed_lists, "LARGEST", 4 * 4 * 32 * 34)
    assert lists(of_table()) == 0
    assert lists(of_table(requires_grad=False)) == 1
