"""Sums of a few coordinates: a formula where last bits do not matter, data where they decide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor

from attnfx import expr
from attnfx.expr import Call, Const, Expr, Load
from attnfx.patterns.order import decisive, free, is_free, settled
from attnfx.testing import GraphLog, square_tensors

BATCH, HEADS, SIZE, WIDTH = 2, 3, 37, 16

Bias = Callable[[Tensor], Tensor]


def apart(x: Tensor) -> Tensor:
    return x[:, :, None] - x[:, None]


def squares(x: Tensor) -> Tensor:
    return apart(x).square().sum(-1)


SMOOTH: dict[str, Bias] = {
    "power": lambda x: apart(x).pow(2).sum(-1),
    "operator": lambda x: (apart(x) ** 2).sum(dim=-1, keepdim=True)[..., 0],
    "product with itself": lambda x: (apart(x) * apart(x)).sum(-1),
    "mean": lambda x: apart(x).square().mean(-1),
    "manhattan": lambda x: apart(x).abs().sum(-1),
    "norm": lambda x: apart(x).norm(dim=-1),
    "vector norm": lambda x: torch.linalg.vector_norm(apart(x), dim=-1),
    "cdist": lambda x: torch.cdist(x, x),
    "cdist without a product": lambda x: 1 / torch.cdist(x, x + 3, compute_mode="donot_use_mm_for_euclid_dist"),
    "root": lambda x: squares(x).sqrt(),
    "gaussian": lambda x: torch.exp(-0.3 * squares(x)),
    "logarithm": lambda x: torch.log(squares(x) + 1),
    "logarithm of one more": lambda x: torch.log1p(torch.cdist(x, x)),
    "cauchy": lambda x: 1 / (1 + squares(x)),
    "products": lambda x: x @ x.transpose(-1, -2),
    "einsum": lambda x: torch.einsum("bid, bjd -> bij", x, x),
    "square of a sum": lambda x: (x * x).sum(-1)[:, :, None] + (x * x).sum(-1)[:, None] - 2 * x @ x.transpose(-1, -2),
    "half precision": lambda x: (apart(x.bfloat16()) ** 2).sum(-1).float(),
}
#: What is data is a tensor of numbers, or one of booleans.
DECISIVE: dict[str, tuple[Bias, torch.dtype]] = {
    "threshold": (lambda x: torch.where(squares(x) < 1.5, 0.0, -1e9), torch.bool),
    "equality": (lambda x: (squares(x) == 0).float(), torch.bool),
    "floor": (lambda x: squares(x).floor(), torch.float32),
    "whole number": (lambda x: squares(x).long().float(), torch.float32),
    "bucket": (lambda x: torch.bucketize(squares(x), torch.tensor([0.5, 1.0, 2.0])).float(), torch.float32),
    "remainder": (lambda x: squares(x) % 1.0, torch.float32),
    "quotient by what may cancel": (lambda x: 1 / (x @ x.transpose(-1, -2)), torch.float32),
    "root of what may cancel": (lambda x: (x @ x.transpose(-1, -2)).sqrt().nan_to_num(0.0), torch.float32),
    "logarithm of what a product lost": (lambda x: torch.log(torch.cdist(x, x) + 1e-3), torch.float32),
    "five coordinates": (lambda x: apart(F.pad(x, (0, 2), value=0.3).cumsum(-1)).square().sum(-1), torch.float32),
}  # fmt: skip


def attention(bias: Bias) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, points: Tensor, falloff: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        return (scores - falloff[:, None, None] * bias(points)[:, None]).softmax(-1) @ v

    return attend


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [*(torch.randn(BATCH, HEADS, SIZE, WIDTH) for _ in range(3)), torch.randn(BATCH, SIZE, 3), torch.rand(HEADS)]


def pairs(report_site: object) -> list[torch.dtype]:
    """The types of side tensors with a number for each query and key."""
    return [t.dtype for t in report_site.side if t.shape.count(SIZE) > 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_sums_are_formulas(name: str) -> None:
    given, log, attend = inputs(), GraphLog(), attention(SMOOTH[name])
    with torch.no_grad():
        got, report = compiled(attend, *given, inner=log)
    (found,) = report.sites
    assert found.rewritten, found
    assert found.site.head_dim == WIDTH
    assert pairs(found.site) == []
    assert [square_tensors(gm, SIZE) for gm in log.graphs] == [[]]
    assert_same(got, attend(*(t if name == "half precision" else t.double() for t in given)))


@pytest.mark.parametrize("name", DECISIVE)
def test_where_last_bits_decide_it_is_data(name: str) -> None:
    bias, dtype = DECISIVE[name]
    given = inputs()
    got, report = compiled(attention(bias), *given)
    (found,) = report.sites
    assert found.rewritten, found
    assert pairs(found.site) == [dtype]
    assert_same(got, attention(bias)(*given))


def test_gradients_of_coordinates_are_those_of_data() -> None:
    given = [t.requires_grad_() for t in inputs()]
    attend = attention(squares)
    got, report = compiled(attend, *given)
    assert "learned bias is read as the model computed it" in report.sites[0].reason
    want = attend(*given)
    weight = torch.randn_like(want)
    assert_same(torch.autograd.grad(got, given, weight), torch.autograd.grad(want, given, weight), 2e-5)


def test_a_few_heads_that_are_mixed_are_no_coordinates() -> None:
    """Scores of all heads meet in each (talking heads): nothing that has them in a sum is written out."""
    mix = torch.randn(HEADS, HEADS)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhij, hg -> bgij", q @ k.transpose(-1, -2), mix)
        return scores.softmax(-1) @ v

    given = inputs()[:3]
    got, _ = compiled(attend, *given)
    assert_same(got, attend(*given))


def test_heads_as_narrow_as_coordinates_are_scores() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.einsum("bhid, bhjd -> bhij", q, k) * 0.5).softmax(-1) @ v

    given = [t[..., :3] for t in inputs()[:3]]
    got, report = compiled(attend, *given)
    assert report.sites[0].site.head_dim == 3
    assert_same(got, attend(*given))


F32 = torch.float32
X, Y = (Load(name, (expr.index("i"), expr.index("j")), F32) for name in "xy")
SUM, SQUARES = free(expr.add(X, Y)), free(expr.add(expr.mul(X, X), expr.mul(Y, Y)))


def of(op: str, *args: Expr) -> Call:
    return Call(op, args, F32)


@pytest.mark.parametrize(
    ("e", "decides"),
    [
        (SUM, False),
        (of("sqrt", SQUARES), False),
        (of("sqrt", SUM), True),
        (of("sqrt", expr.sub(SQUARES, X)), True),
        (of("sqrt", expr.sub(of("abs", SQUARES), Const(1.0, F32))), True),
        (of("sqrt", expr.add(SQUARES, of("abs", X))), False),
        (of("sqrt", expr.add(SQUARES, X)), True),
        (of("log", of("max", SUM, Const(1.0, F32))), False),
        (of("log", of("max", SUM, Const(1e-6, F32))), True),
        (of("log1p", SQUARES), False),
        (of("log1p", of("neg", SQUARES)), True),
        (of("div", X, SQUARES), False),
        (of("div", X, free(SQUARES)), True),
        (of("div", X, expr.add(free(SQUARES), Const(1.0, F32))), False),
        (of("div", X, expr.add(SUM, Const(1.0, F32))), True),
        (of("div", X, expr.add(of("exp", SUM), Const(1.0, F32))), False),
        (of("div", SUM, X), False),
        (of("pow", SQUARES, Const(-1.5, F32)), False),
        (of("pow", SUM, Const(0.5, F32)), True),
        (of("pow", SUM, Const(2.0, F32)), False),
        (of("pow", X, SUM), True),
        (of("tanh", SUM), False),
        (of("floor", SUM), True),
        (expr.cast(SUM, torch.int64), True),
        (expr.cast(SUM, torch.bfloat16), False),
        (expr.lt(SUM, X), True),
        (expr.where(expr.lt(X, Y), SUM, Y), False),
        (expr.where(expr.lt(SUM, Y), X, Y), True),
        (Load("table", (expr.cast(SUM, torch.int64),), F32), True),
        (of("floor", X), False),
    ],
)  # fmt: skip
def test_what_last_bits_decide(e: Expr, decides: bool) -> None:
    assert decisive(e) is decides
    assert not any(is_free(n) for n in expr.walk(settled(e)))
