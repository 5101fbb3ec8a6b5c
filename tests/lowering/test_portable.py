"""The blockwise lowering: odd and empty sizes, half precision, dropout, both of its ways through a block, memory."""

from typing import Any

import pytest
import torch
from band_sites import banded
from lowering_sites import (
    MIN32,
    SCALED,
    H,
    I,
    J,
    alibi,
    causal,
    distance,
    inputs,
    load,
    padding,
    side,
    site,
    softcap,
    window,
)  # fmt: skip
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.expr import Int
from attnfx.lowering import portable
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.portable import aten, blocks
from attnfx.lowering.portable.affine import affine
from attnfx.lowering.portable.backward import diagonal_sums
from attnfx.lowering.portable.philox import _philox, dropout_scale
from attnfx.site import AttentionSite
from attnfx.testing import peak_bytes


def plan_of(s: AttentionSite) -> KernelPlan:
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan), plan
    return plan


@pytest.fixture(params=["fused", "textbook"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Through torch's CPU kernel where it applies, and never."""
    if request.param == "textbook":
        monkeypatch.setattr(aten.Fused, "of", staticmethod(lambda problem: None))
    return str(request.param)


def run(s: AttentionSite, q: Tensor, k: Tensor, v: Tensor, loads: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of q, k, v, for a gradient of ones."""
    out = torch.ops.attnfx.attention(q, k, v, list(loads), [], plan_of(s).to_json())
    return out, torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def wanted(s: AttentionSite, q: Tensor, k: Tensor, v: Tensor, loads: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = s.reference(*leaves, *loads)
    return out, torch.autograd.grad(out, leaves, torch.ones_like(out))


def compare(s: AttentionSite, dtype: torch.dtype, tolerance: float, loads: tuple[Tensor, ...] = ()) -> None:
    q, k, v = inputs(s, dtype)
    (out, grads), (want, want_grads) = run(s, q, k, v, loads), wanted(s, q, k, v, loads)
    assert out.dtype == dtype
    assert distance(out, want) < tolerance
    for mine, theirs in zip(grads, want_grads, strict=True):
        assert mine.dtype == dtype
        if theirs.abs().max() < 1e-12:  # cancelled, with one key: the rounding of a term a row is left, and differs between CPUs
            assert mine.abs().max() < 1e-6 * q.shape[-2]
        else:
            assert distance(mine, theirs) < 5 * tolerance


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (70, 1), (131, 257), (300, 300)])
@pytest.mark.parametrize("keep", [expr.TRUE, causal(), causal(40), window(33)], ids=["full", "causal", "offset", "window"])
def test_odd_sizes(way: str, m: int, n: int, keep: expr.Expr) -> None:
    compare(site(keep=keep, queries=m, keys=n, empty_rows="zero"), torch.float32, 1e-5)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_grouped_heads(way: str, heads: int, key_heads: int) -> None:
    compare(site(keep=causal(16), heads=heads, key_heads=key_heads), torch.float32, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("score", [SCALED, softcap()], ids=["scale", "softcap"])
def test_half_precision(way: str, dtype: torch.dtype, tolerance: float, score: expr.Expr) -> None:
    compare(site(score, causal(16), dtype=dtype, queries=200, keys=200), dtype, tolerance)


@pytest.mark.parametrize("layout", ["heads last", "transposed", "expanded"])
def test_any_strides(way: str, layout: str) -> None:
    s = site(keep=causal(16))
    q, k, v = inputs(s, torch.float32)
    changed = {
        "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda t: t[:1].expand_as(t),
    }[layout]
    made = [changed(t.detach()).requires_grad_() for t in (q, k, v)]
    (out, grads), (want, want_grads) = run(s, *made), wanted(s, *made)
    assert distance(out, want) < 1e-5
    assert all(distance(a, b) < 1e-5 for a, b in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize("changes", [{"queries": 0}, {"keys": 0}, {"batch": 0}])
def test_empty_sizes(changes: dict[str, int]) -> None:
    s = site(keep=causal(), **changes)
    q, k, v = inputs(s, torch.float32)
    out, grads = run(s, q, k, v)
    torch.testing.assert_close(out, torch.zeros_like(out))
    assert all(not g.any() for g in grads)


def test_left_padding_meets_both_ways_in_one_call() -> None:
    """The first block of rows holds rows without keys, the others do not."""
    keep = expr.logical_and(causal(), load(0, expr.index("b"), J, dtype=torch.bool))
    s = site(keep=keep, queries=600, keys=600, fill=MIN32, empty_rows="fill", side=(side(2, 600, dtype=torch.bool),))
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[1, :20] = False
    compare(s, torch.float32, 1e-5, (mask,))


def test_a_fill_within_reach_is_not_given_to_torch() -> None:
    compare(site(keep=causal(), fill=-3.0, empty_rows="fill"), torch.float32, 1e-5)


def test_random_padding(way: str) -> None:
    keep = load(0, expr.index("b"), J, dtype=torch.bool)
    for rows in ("zero", "nan"):
        compare(site(keep=keep, side=(side(2, 53, dtype=torch.bool),), empty_rows=rows), torch.float32, 1e-5, (padding(True),))


@pytest.mark.parametrize(
    ("score", "scale", "biased"),
    [(SCALED, 0.25, False), (expr.div(SCALED, expr.lift(2.0)), 0.125, False),
     (alibi(), 0.25, True), (-SCALED, -0.25, False), ((SCALED + load(0, H)) * 2.0, 0.5, True)],
)  # fmt: skip
def test_affine_programs_are_read(score: expr.Expr, scale: float, biased: bool) -> None:
    form = affine(score)
    assert form is not None
    assert form.scale == scale
    assert (form.bias is not None) == biased


def test_other_programs_are_not_affine() -> None:
    assert affine(softcap()) is None
    assert affine(SCALED * SCALED) is None


def test_diagonal_sums() -> None:
    t = torch.randn(3, 5, 7)
    want = torch.zeros(3, 11)
    for i in range(5):
        for j in range(7):
            want[:, i - j + 6] += t[:, i, j]
    torch.testing.assert_close(diagonal_sums(t), want)


def test_memory_stays_below_the_score_matrix() -> None:
    s = site(softcap(), causal(), batch=1, heads=4, key_heads=4, queries=4096, keys=4096)
    q, k, v = (t.detach() for t in inputs(s, torch.float32))
    text = plan_of(s).to_json()
    used = peak_bytes(lambda: torch.ops.attnfx.attention(q, k, v, [], [], text))
    assert used < 4 * 4096 * 4096 * 4 / 3
    assert used < 20 * blocks.ELEMENTS * 4


def test_a_second_product_takes_no_memory_of_its_own() -> None:
    made = banded(keep=causal(), row=Int(J.value - I.value + 4095), shape=(1, 1, 8191), batch=1, heads=4, key_heads=4, queries=4096,
                  keys=4096)  # fmt: skip
    q, k, v = inputs(made, torch.float32)
    vectors, text = torch.randn(1, 1, 8191, 16, requires_grad=True), plan_of(made).to_json()

    def step() -> object:
        out = torch.ops.attnfx.attention(q, k, v, [vectors], [], text)
        return torch.autograd.grad(out.sum(), (q, k, v, vectors))

    assert peak_bytes(step) < 4 * 4096 * 4096 * 4 / 3


def test_dropout_keeps_the_mean_and_repeats_with_its_seed() -> None:
    s = site(dropout=0.25, queries=64, keys=512, heads=2, key_heads=2)
    plan = plan_of(s)
    q, k, v = (t.detach() for t in inputs(s, torch.float32))
    v = torch.ones_like(v)
    first, again, other = (portable.forward(plan, q, k, v, (), (), torch.tensor([n])).out for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(float(first.mean()) - 1.0) < 0.01


def test_dropout_has_the_gradient_of_its_own_mask() -> None:
    small: dict[str, Any] = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 5, "keys": 6, "head_dim": 3, "value_dim": 3}
    s = site(keep=causal(2), dropout=0.4, **small)
    q, k, v = inputs(s, torch.float64)
    seed, text = torch.tensor([77]), plan_of(s).to_json()
    assert torch.autograd.gradcheck(lambda q, k, v: torch.ops.attnfx.flash(q, k, v, [], [], seed, text)[0], (q, k, v))


def test_philox_is_the_published_one() -> None:
    """Random123's known answer for counter 0 and key 0, as a uniform float."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert int(_philox(zero, zero, zero, zero)) == 0x6627E8D5
    assert float(dropout_scale(zero, zero, zero, zero, zero, 1, 0.5)) in (0.0, 2.0)
