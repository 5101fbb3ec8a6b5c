"""Attentions in pieces that are divided once in the end: hierarchical and chunked ones, and their look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import assert_same, compiled
from torch import Tensor

from attnfx.report import Report

B, H, S, D = 2, 3, 12, 8
LOW = -torch.finfo(torch.float32).max
NINF = float("-inf")
KEPT = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(3)) > 0.4
KEPT[0, 0, 3] = False
Piece = tuple[Tensor, Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("... i d, ... j d -> ... i j", q, k)


def piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, fill: float | None = None) -> Piece:
    """One level of h-transformer-1d: product and row sums, with the row's maximum taken off."""
    s = scores(q, k)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.finfo(s.dtype).max if fill is None else fill)
    s = s - torch.max(s, dim=-1, keepdim=True).values.detach()
    a = s.exp()
    return torch.einsum("... i j, ... j d -> ... i d", a, v), a.sum(dim=-1)


def levels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of keys and, for the other half, means of two keys and sums of two values."""

    def blocks(t: Tensor) -> Tensor:
        return t.view(B, H, 3, -1, D)

    def halved(t: Tensor) -> Tensor:
        return t.view(B, H, S // 2, 2, D)

    y, a = piece(*map(blocks, (q, k, v)))
    far = [blocks(halved(q).mean(3)), blocks(halved(k).mean(3)), blocks(halved(v).sum(3))]
    more, weights = piece(far[0], *(t.flip(2) for t in far[1:]))
    y = y.flatten(2, 3) + more.flatten(2, 3).repeat_interleave(2, 2)
    return y / (a.flatten(2) + weights.flatten(2).repeat_interleave(2, 2) + 1e-8)[..., None]


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rabe and Staats 2021 (arXiv:2112.05682), as memory_efficient_attention_pytorch has it: three results a chunk."""
    found = []
    for part in range(0, S, 4):
        s = scores(q * D**-0.5, k[:, :, part : part + 4])
        causal = torch.ones(S, 4, dtype=torch.bool).triu(1 - part)
        s = s.masked_fill(causal, -torch.finfo(s.dtype).max)
        top = s.amax(dim=-1, keepdim=True).detach()
        e = torch.nn.functional.dropout((s - top).exp(), p=0.0)
        found.append((e.sum(dim=-1), torch.einsum("bhij,bhjd->bhid", e, v[:, :, part : part + 4]), top.squeeze(-1)))
    sums, values, maxima = (torch.stack(t, dim=-1) for t in zip(*found, strict=True))
    share = (maxima - maxima.amax(dim=-1, keepdim=True)).exp().detach()
    return (values * share[:, :, :, None]).sum(dim=-1) / ((sums * share).sum(dim=-1)[..., None] + 1e-8)


def clamped_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The row sums are read before the values are met."""
    s = scores(q, k).masked_fill(~KEPT, LOW)
    e = (s - s.detach().amax(-1, keepdim=True)).exp()
    total = e.sum(-1, keepdim=True).clamp(min=1e-6)
    y = e @ v
    return y.sum(2, keepdim=True) / total


def kept_sums(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.detach().max(-1)[0].unsqueeze(-1)).exp()
    return e.matmul(v), e.sum(-1, True) * 2


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    k, v = (t[:, :1].expand(B, H, S, D) for t in (k, v))
    y, a = piece(q, k, v, KEPT)
    return y.transpose(1, 2).reshape(B, S, H * D), a.transpose(1, 2).reshape(B, S * H)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k) + q.sum(-1)[..., None, :] + torch.where(KEPT, 0.0, LOW)
    e = (s - s.detach().amax(-1, keepdim=True)).exp()
    return e @ v, e.sum(-1)


def edited(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    """Both results are edited in place later."""
    y, a = piece(q, k, v, KEPT)
    a += 1e-3
    y *= 2
    return y / a[..., None], a


def also(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    e = (s - s.detach().amax(-1, keepdim=True)).exp()
    return e @ v, e.sum(-1), e[..., :2]


def twice_summed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    e = (s - s.detach().amax(-1, keepdim=True)).exp()
    return e @ v, e.sum(-1), e.sum(-1, keepdim=True) + 1


SPELLINGS: dict[str, tuple[Callable[..., Any], int]] = {
    "levels": (levels, 2), "chunked": (chunked, 3), "clamped first": (clamped_first, 1), "kept sums": (kept_sums, 1),
    "masked": (lambda q, k, v: piece(q, k, v, KEPT), 1), "masked -1e4": (lambda q, k, v: piece(q, k, v, KEPT, -1e4), 1),
    "grouped": (grouped, 1), "biased": (biased, 1), "edited": (edited, 1), "also": (also, 1), "twice summed": (twice_summed, 1),
}  # fmt: skip


def operands(dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, S, D).to(dtype).requires_grad_(grad) for _ in range(3)]


def rewritten(report: Report) -> int:
    return sum(s.rewritten for s in report.sites)


def gradients(results: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    parts = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad(sum((p * torch.randn(p.shape).to(p)).sum() for p in parts), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPELLINGS)
def test_pieces_are_the_models(name: str) -> None:
    function, count = SPELLINGS[name]
    given = operands(grad=True)
    got, report = compiled(function, *given)
    want = function(*given)
    assert rewritten(report) == count
    assert report.missed == ()
    assert_same(got, want, 1e-11)
    assert_same(gradients(got, given), gradients(want, given), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["levels", "chunked", "masked"])
def test_in_the_dtypes_of_models_verified(name: str, dtype: torch.dtype) -> None:
    function, count = SPELLINGS[name]
    given = operands(dtype)
    got, report = compiled(function, *given, verify=True)
    assert rewritten(report) == count
    assert all(s.measured is not None and not s.measured.note for s in report.sites)
    assert_same(got, function(*given))


def test_a_wrong_row_sum_is_found_by_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfx.errors import VerificationError
    from attnfx.lowering import outside

    right = outside.unnormalised

    def wrong(out: Tensor, kernel: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, sums, maxima = right(out, kernel)
        return y, sums * 1.01, maxima

    monkeypatch.setattr(outside, "unnormalised", wrong)
    with pytest.raises(Exception, match="differs from the original") as raised:
        compiled(levels, *operands(torch.float32), verify=True)
    assert VerificationError.__name__ in str(raised.type) + str(raised.value) + repr(raised.value.__cause__)


def test_a_row_without_keys_is_nan_in_both() -> None:
    given = operands()
    got, report = compiled(lambda q, k, v: piece(q, k, v, KEPT, NINF), *given)
    want = piece(*given, KEPT, NINF)
    assert rewritten(report) == 1
    assert bool(want[1].isnan().any())
    assert_same(got, want, 1e-11)


def test_lengths_known_only_at_run_time() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Piece:
        y, a = piece(q, k, v)
        return y, a.transpose(1, 2)

    given = operands()
    for t in given:
        torch._dynamo.mark_dynamic(t, 2)
    got, report = compiled(function, *given)
    assert rewritten(report) == 1
    assert not report.sites[0].site.queries.is_Integer
    assert_same(got, function(*given), 1e-11)


def attached(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e @ v, e.sum(-1)


def attached_maximum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    top = s.amax(-1, keepdim=True)
    e = (s - top.detach()).exp()
    return e @ v, e.sum(-1), top * 2


@pytest.mark.parametrize("function", [attached, attached_maximum])
def test_a_gradient_through_the_maximum_leaves_a_piece_alone(function: Callable[..., Any]) -> None:
    given = operands(grad=True)
    got, report = compiled(function, *given)
    assert rewritten(report) == 0
    assert any("row maxim" in m.reason for m in report.missed)
    assert_same(gradients(got, given), gradients(function(*given), given), 1e-11)
    with torch.no_grad():
        got, report = compiled(function, *given)
    assert rewritten(report) == 1
    assert_same(got, function(*given), 1e-11)


def test_a_policy_for_everything_leaves_pieces_exact() -> None:
    from attnfx import Policy, Rule
    from attnfx.variants import SlidingWindow

    given = operands()
    got, report = compiled(levels, *given, policy=Policy([Rule("*", SlidingWindow(4))]))
    assert rewritten(report) == 2
    assert all(s.exact and "divided later" in s.reason for s in report.sites)
    assert_same(got, levels(*given), 1e-11)


def masked_again(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e.masked_fill(~KEPT, 0.0) @ v, e.sum(-1)


def summed_masked(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp().masked_fill(~KEPT, 0.0)
    return e @ v, e.sum(-1)


def other_maximum(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    """The maximum is that of scores before the mask."""
    s = scores(q, k)
    e = (s.masked_fill(~KEPT, NINF) - s.amax(-1, keepdim=True)).exp()
    return e @ v, e.sum(-1)


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return e @ v, e.sum(-2)


def sums_of_some_rows(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e[:, :, 2:] @ v, e.sum(-1)


def without_a_column(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = torch.cat([scores(q, k), q[..., :1]], -1)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e[..., :-1] @ v, e.sum(-1)


def read_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> Piece:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    total = e.sum(-1)
    return e @ (v * total.mean()), total


LOOKALIKES = (masked_again, summed_masked, other_maximum, other_axis, sums_of_some_rows, without_a_column, read_before_the_values)


@pytest.mark.parametrize("function", LOOKALIKES)
def test_lookalikes_are_left_alone(function: Callable[..., Any]) -> None:
    given = operands()
    got, report = compiled(function, *given)
    assert rewritten(report) == 0
    assert_same(got, function(*given), 1e-11)


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y, a = piece(q, k, v)
    return y / a[..., None]


def divided_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def divided_attached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y, a = attached(q, k, v)
    return y / a[..., None]


@pytest.mark.parametrize("function", [divided, divided_before, divided_attached])
def test_one_piece_that_is_divided_is_a_softmax(function: Callable[..., Any]) -> None:
    given = operands(grad=True)
    got, report = compiled(function, *given)
    assert [s.site.normaliser for s in report.sites] == ["softmax"]
    assert report.missed == ()
    assert_same(got, function(*given), 1e-11)
