"""AttentionSite: equality, notation, what it says of itself, and its meaning."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from attnfx import expr
from attnfx.expr import Const, Load, Score, index, integer
from attnfx.site import AttentionSite, Origin, SideTensor

I, J, H = index("i"), index("j"), index("h")
SCALED = expr.call("mul", Score(), Const(0.5, torch.float64), dtype=torch.float32)
CAUSAL = expr.le(J, I)
ALIBI = Score() + Load(0, (H,), torch.float32) * (J - I)
LOW = torch.finfo(torch.float32).min


def site(**changes: Any) -> AttentionSite:
    sizes = {"batch": 2, "heads": 4, "key_heads": 2, "queries": 5, "keys": 7}
    given: dict[str, Any] = {
        **{name: sympy.Integer(n) for name, n in sizes.items()},
        "head_dim": 8, "value_dim": 8, "dtype": torch.float32, "device": "cpu", "score": SCALED, **changes,
    }  # fmt: skip
    return AttentionSite(**given)


def test_origin_does_not_count() -> None:
    a, b = site(origin=Origin("layers.0")), site(origin=Origin("layers.1"))
    assert a == b
    assert hash(a) == hash(b)
    assert a != site(keep=CAUSAL)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "softmax((q·k)·0.5 | full) v  [B=2 H=4/2 M=5 N=7 D=8 fp32]"),
        ({"keep": CAUSAL}, "softmax((q·k)·0.5 | causal) v  [B=2 H=4/2 M=5 N=7 D=8 fp32]"),
        (
            {"keep": expr.logical_and(expr.le(J, I + 2), expr.lt(I - J, integer(3))), "fill": LOW, "additive": True},
            "softmax((q·k)·0.5 | j ≤ i + 2 ∧ i - j ≤ 2 else +min(fp32)) v  [B=2 H=4/2 M=5 N=7 D=8 fp32]",
        ),
        (
            {"score": ALIBI, "key_heads": sympy.Integer(4), "value_dim": 3, "dropout": 0.1},
            "softmax(q·k + T0[h]·(j - i) | full, dropout 0.1) v  [B=2 H=4 M=5 N=7 D=8/3 fp32]",
        ),
    ],
)
def test_prints_as_one_line_of_mathematics(changes: dict[str, Any], line: str) -> None:
    assert str(site(**changes)) == line


def test_scale_is_known_only_where_the_score_is_nothing_else() -> None:
    assert site().scale == 0.5
    assert site(score=Score()).scale == 1.0
    assert site(score=SCALED + Load(0, (J,), torch.float32)).scale is None


def test_symbols_are_the_sizes_that_the_formulas_mention() -> None:
    n = sympy.Symbol("s7", integer=True, positive=True)
    assert site(keep=expr.le(J, I + expr.Int(n))).symbols == (n,)
    assert site(keep=CAUSAL).symbols == ()


def test_reference_is_the_plain_meaning() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 7, 8).double(), torch.randn(2, 2, 7, 8).double()
    padding = torch.rand(2, 7) > 0.4
    keep = expr.logical_and(CAUSAL, Load(0, (index("b"), J), torch.bool))
    described = site(keep=keep, side=(SideTensor((sympy.Integer(2), sympy.Integer(7)), torch.bool),), empty_rows="zero")
    mask = torch.arange(7) <= torch.arange(5)[:, None]
    want = F.scaled_dot_product_attention(q, k, v, mask & padding[:, None, None], scale=0.5, enable_gqa=True)
    torch.testing.assert_close(described.reference(q, k, v, padding), want)
