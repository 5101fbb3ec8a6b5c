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


def test_who_changes_the_meaning_forgets_its_roundings() -> None:
    coarse = site(literal=expr.call("add", Score(), Const(0.5, torch.float16), dtype=torch.float16))
    assert coarse.replace(dropout=0.5).literal == coarse.literal
    assert coarse.replace(keep=CAUSAL).literal is None
    assert coarse.replace(keep=CAUSAL, literal=coarse.literal).literal == coarse.literal


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
        (
            {"keep": CAUSAL, "sink": Load(0, (H,), torch.float32), "fill": LOW},
            "softmax((q·k)·0.5 | causal else min(fp32), sink T0[h]) v  [B=2 H=4/2 M=5 N=7 D=8 fp32]",
        ),
        (
            {"weight": 1.0 - Load(0, (H,), torch.float32), "dropout": 0.1},
            "(1 - T0[h])·softmax((q·k)·0.5 | full, dropout 0.1) v  [B=2 H=4/2 M=5 N=7 D=8 fp32]",
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
    assert site(sink=Load(0, (expr.Int(n),), torch.float32)).symbols == (n,)
    assert site(weight=Load(0, (expr.Int(n),), torch.float32)).symbols == (n,)


def test_a_sink_is_a_key_without_a_value_and_a_weight_comes_after_the_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8).double() for h, n in ((4, 5), (2, 7), (2, 7)))
    sinks, gate = torch.randn(4).double(), torch.rand(4, 7).double()
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    logits = (q @ k.mT * 0.5).masked_fill(torch.arange(7) > torch.arange(5)[:, None] - 1, float("-inf"))
    logits = torch.cat([logits, sinks[None, :, None, None].expand(2, 4, 5, 1)], -1)  # as gpt-oss does
    want = (logits.softmax(-1)[..., :-1] * gate[:, None]) @ v
    sink, weight = Load(0, (H,), torch.float64), Load(1, (H, J), torch.float64)
    described = site(keep=expr.le(J, I - 1), sink=sink, weight=weight, key_heads=sympy.Integer(4))
    out, lse = described.reference_lse(q, k, v, sinks, gate)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert not out[:, :, 0].any()


def test_reference_is_the_plain_meaning() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 7, 8).double(), torch.randn(2, 2, 7, 8).double()
    padding = torch.rand(2, 7) > 0.4
    keep = expr.logical_and(CAUSAL, Load(0, (index("b"), J), torch.bool))
    described = site(keep=keep, side=(SideTensor((sympy.Integer(2), sympy.Integer(7)), torch.bool),), empty_rows="zero")
    mask = torch.arange(7) <= torch.arange(5)[:, None]
    want = F.scaled_dot_product_attention(q, k, v, mask & padding[:, None, None], scale=0.5, enable_gqa=True)
    torch.testing.assert_close(described.reference(q, k, v, padding), want)
