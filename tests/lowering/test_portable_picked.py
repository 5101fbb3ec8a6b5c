"""Blocks of rows that read only some tiles of keys: the same results and gradients, and fewer keys."""

import pytest
import torch
from lowering_sites import SCALED, B, H, I, J, causal, distance, inputs, load, side, site, softcap
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.portable import aten, picked
from attnfx.lowering.portable.aten import Fused
from attnfx.lowering.portable.blocks import Problem
from attnfx.site import AttentionSite

S = 1100
LONG = {"batch": 2, "heads": 4, "key_heads": 2, "queries": S, "keys": S}
SINKS = expr.logical_and(causal(), expr.logical_or(expr.lt(I - J, expr.integer(100)), expr.lt(J, expr.integer(5))))
TABLE = load(0, B, H, expr.floordiv(I, expr.integer(64)), expr.floordiv(J, expr.integer(16)), dtype=torch.bool)


def table(part: float = 0.1) -> Tensor:
    found = torch.rand(2, 4, 18, 69, generator=torch.Generator().manual_seed(0)) < part
    found[..., 0] = True
    found[1, :2] = found[1, :1]
    return found


def of_table(score: expr.Expr = SCALED, **changes: object) -> AttentionSite:
    return site(score, expr.logical_and(causal(), TABLE), side=(side(2, 4, 18, 69, dtype=torch.bool),), **LONG | changes)


CASES = {
    "sinks": (site(keep=SINKS, **LONG), ()),
    "table": (of_table(), (table(),)),
    "table and bias": (
        site(SCALED + load(1, J), expr.logical_and(causal(), TABLE), **LONG,
             side=(side(2, 4, 18, 69, dtype=torch.bool), side(S, grad=True))),
        (table(), torch.linspace(-1, 1, S).requires_grad_()),
    ),
    "rows without keys": (of_table(empty_rows="zero"), (table() & (torch.arange(18) % 3 > 0)[:, None],)),
    "softcap": (of_table(softcap()), (table(),)),
}  # fmt: skip


def plan_of(s: AttentionSite) -> KernelPlan:
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan), plan
    return plan


@pytest.mark.parametrize("way", ["fused", "textbook"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "textbook":
        monkeypatch.setattr(aten.Fused, "of", staticmethod(lambda problem: None))
    monkeypatch.setattr(picked, "CALL", 1 << 10)
    s, loads = CASES[name]
    tensors = [*inputs(s, torch.float32), *(t for t in loads if t.requires_grad)]
    out = torch.ops.attnfx.attention(*tensors[:3], list(loads), [], plan_of(s).to_json())
    push = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, push)
    want = s.reference(*(t.double() for t in tensors[:3]), *loads)
    assert distance(out, want) < 1e-5
    for mine, theirs in zip(grads, torch.autograd.grad(want, tensors, push.double()), strict=True):
        assert distance(mine, theirs) < 5e-5


def test_only_kept_tiles_are_read() -> None:
    """At one row of tiles and one pair of heads, the keys of a block are those of the tiles that the table keeps."""
    s, loads = CASES["table"]
    q, k, v = inputs(s, torch.float32)
    problem = Problem(plan_of(s), q, k, v, loads, (), None)
    block = problem.block(range(1, 2), range(2), range(640, 704))
    tiles = loads[0][1, :2, 10, :44].any(0).nonzero()[:, 0]
    assert block.at is not None
    assert block.at.tolist() == [int(t) * 16 + n for t in tiles for n in range(16)]
    assert [p for _, run in block.pieces() for p in run] == block.at.tolist()
    assert block.unsure is not None
    assert set(block.at[block.unsure].tolist()) <= set(range(640, 704))


def test_heads_that_keep_alike_stay_together() -> None:
    s, loads = CASES["sinks"]
    fused = Fused.of(Problem(plan_of(s), *inputs(s, torch.float32), loads, (), None))
    assert fused is not None
    first, *others = fused.blocks(range(640, 768))
    assert not others
    assert first.at is not None
    assert first.at.tolist() == [*range(32), *range(512, 768)]
