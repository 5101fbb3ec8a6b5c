"""Pieces joined before one softmax, their parts multiplied with values of their own; and look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import assert_same, compiled
from torch import Tensor

from attnfx.report import Report

B, H, L, M, N, G, D = 2, 3, 4, 5, 6, 4, 8
LOW = -torch.finfo(torch.float32).max
LOCAL = torch.rand(B, 1, L, M, N, generator=torch.Generator().manual_seed(3)) > 0.4
LOCAL[0, 0, 1, 2] = False
GLOBAL = torch.rand(B, 1, 1, 1, G, generator=torch.Generator().manual_seed(4)) > 0.4
GLOBAL[0] = False
SHAPES = ((B, H, L, M, D), (B, H, L, N, D), (B, H, L, N, D), (B, H, G, D), (B, H, G, D))


def operands(dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    """Queries in blocks, local keys and values in blocks, global keys and values."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in SHAPES]


def local(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhlqd,bhlkd->bhlqk", q, k) * 0.3


def to_global(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhlqd,bhkd->bhlqk", q, k) * 0.3


def summed(p: Tensor, v: Tensor, vg: Tensor) -> Tensor:
    return torch.einsum("bhlqk,bhkd->bhlqd", p[..., :G], vg) + p[..., G:] @ v


def plain(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    return summed(torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1), v, vg)


def masked(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor, fill: float = LOW) -> Tensor:
    s = [to_global(q, kg).masked_fill(~GLOBAL, fill), local(q, k).masked_fill(~LOCAL, fill)]
    return summed(torch.cat(s, dim=-1).softmax(-1), v, vg)


def without_keys(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    return masked(q, k, v, kg, vg, float("-inf"))


def one_masked(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    s = [to_global(q, kg), torch.where(LOCAL, local(q, k), -1e9)]
    return summed(torch.cat(s, dim=-1).softmax(-1), v, vg)


def two_fills(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    s = [to_global(q, kg).masked_fill(~GLOBAL, -1e4), local(q, k).masked_fill(~LOCAL, -2e4)]
    return summed(torch.cat(s, dim=-1).softmax(-1), v, vg)


def big_bird(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    """Penalties are added in place, the products too; the first and the last keys are the same for all blocks."""
    s = q @ k.transpose(-1, -2) * 0.3
    first, last = (torch.einsum("bhlqd,bhkd->bhlqk", q, t) * 0.3 for t in (kg[:, :, :2], kg[:, :, 2:]))
    s += (1.0 - LOCAL.to(s.dtype)) * -10000.0
    first += (1.0 - GLOBAL[..., :2].to(s.dtype)) * -10000.0
    p = torch.cat([first, s, last], dim=-1).softmax(dim=-1)
    out = p[..., 2 : N + 2] @ v
    out += torch.einsum("bhlqk,bhkd->bhlqd", p[..., :2], vg[:, :, :2])
    out += torch.einsum("bhlqk,bhkd->bhlqd", p[..., -2:], vg[:, :, 2:])
    return out.reshape(B, H, L * M, D)


def one_product_of_joined_values(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    p = torch.cat([local(q, k), to_global(q, kg)], dim=-1).softmax(-1)
    return p @ torch.cat([v, vg[:, :, None].expand(B, H, L, G, D)], dim=-2)


def other_parts_of_values(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    """The values are parted elsewhere than the keys."""
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    values = torch.cat([vg[:, :, None].expand(B, H, L, G, D), v], dim=-2)
    return p[..., :5] @ values[..., :5, :] + p[..., 5:] @ values[..., 5:, :]


def scaled_apart(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    p = torch.cat([to_global(q, kg) * 2, local(q, k).tanh()], dim=-1).softmax(-1)
    return summed(p, v, vg)


def masked_whole(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    s = torch.cat([to_global(q, kg), local(q, k)], dim=-1)
    keep = torch.cat([GLOBAL.expand(B, 1, L, M, G), LOCAL], dim=-1)
    return summed(s.masked_fill(~keep, LOW).softmax(-1), v, vg)


def read_too(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    return summed(p, v, vg), p[..., :G] * 2


def learned_bias(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    """Terms of the global scores that learn, one a key."""
    s = [to_global(q, kg) + kg.sum(-1)[:, :, None, None], local(q, k)]
    return summed(torch.cat(s, dim=-1).softmax(-1), v, vg)


SPELLINGS: tuple[Callable[..., Any], ...] = (
    plain, masked, without_keys, one_masked, two_fills, big_bird, one_product_of_joined_values, other_parts_of_values, scaled_apart,
    masked_whole, read_too,
)  # fmt: skip


def rewritten(report: Report) -> int:
    return sum(s.rewritten for s in report.sites)


def gradients(results: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    parts = results if isinstance(results, tuple) else (results,)
    total = sum((torch.where(p.isfinite(), p, 0.0) * torch.randn(p.shape).to(p)).sum() for p in parts)
    return torch.autograd.grad(total, inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", SPELLINGS)
def test_joined_pieces_are_one_attention(function: Callable[..., Any]) -> None:
    given = operands(grad=True)
    got, report = compiled(function, *given)
    want = function(*given)
    assert rewritten(report) == 1
    assert report.sites[0].site.keys == N + G
    assert report.missed == ()
    assert_same(got, want, 1e-11)
    if function is not without_keys:
        assert_same(gradients(got, given), gradients(want, given), 1e-11)
    assert ("softmax" in report.after.replace("plan('softmax", "")) == (function is read_too)


def test_a_row_without_keys_is_nan() -> None:
    assert bool(without_keys(*operands()).isnan().any())


def test_a_bias_of_one_piece_learns_or_the_pieces_stay() -> None:
    given = operands(grad=True)
    got, _ = compiled(learned_bias, *given)
    want = learned_bias(*given)
    assert_same(got, want, 1e-11)
    assert_same(gradients(got, given), gradients(want, given), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_dtypes_of_models(dtype: torch.dtype) -> None:
    given = operands(dtype)
    got, report = compiled(big_bird, *given, verify=True)
    assert rewritten(report) == 1
    assert all(s.measured is not None and not s.measured.note for s in report.sites)
    assert_same(got, big_bird(*given))


def test_the_number_of_blocks_may_be_known_only_at_run_time() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
        s = [torch.einsum("bhlqd,bhlkd->bhlqk", q, t) for t in (k, kg)]
        p = torch.cat(s, -1).softmax(-1)
        return p[..., :N] @ v + p[..., N:] @ vg

    q, k, v, _, _ = operands()
    given = [q, k, v, k[..., :G, :].clone(), v[..., :G, :].clone()]
    for t in given:
        torch._dynamo.mark_dynamic(t, 2)
    got, report = compiled(function, *given)
    assert rewritten(report) == 1
    assert_same(got, function(*given), 1e-11)


def other_queries(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    return summed(torch.cat([to_global(q * 2, kg), local(q, k)], dim=-1).softmax(-1), v, vg)


def some_are_not_summed(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    return torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)[..., G:] @ v


def some_are_summed_twice(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    return summed(p, v, vg) + p[..., G:] @ v


def not_summed_up(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    return torch.einsum("bhlqk,bhkd->bhlqd", p[..., :G], vg) - p[..., G:] @ v


def changed_on_the_way(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    out = p[..., G:] @ v
    out.mul_(2)
    return out + torch.einsum("bhlqk,bhkd->bhlqd", p[..., :G], vg)


def other_names(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> tuple[Tensor, Tensor]:
    """The sum goes by another name, under which later writes are seen."""
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    out = p[..., G:] @ v
    seen = out.view(B * H, L, M, D)
    out += torch.einsum("bhlqk,bhkd->bhlqd", p[..., :G], vg)
    out *= 2
    return out, seen + 1


def values_changed(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    """Both products read the same memory at different times."""
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    own = v.clone()
    out = p[..., G:] @ own
    own.mul_(3)
    return out + p[..., :G] @ own[..., :G, :]


def keys_changed(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    own = k.clone()
    s = local(q, own)
    own.mul_(3)
    return summed(torch.cat([local(q, own[..., :G, :]), s], dim=-1).softmax(-1), v, vg)


def masked_after(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    """One part of the probabilities is masked again."""
    p = torch.cat([to_global(q, kg), local(q, k)], dim=-1).softmax(-1)
    return torch.einsum("bhlqk,bhkd->bhlqd", p[..., :G], vg) + p[..., G:].masked_fill(~LOCAL, 0.0) @ v


def from_all_scores(q: Tensor, k: Tensor, v: Tensor, kg: Tensor, vg: Tensor) -> Tensor:
    """The scores of one piece are changed by statistics of the other's."""
    s, g = local(q, k), to_global(q, kg)
    return summed(torch.cat([g + s.mean(-1, keepdim=True), s], dim=-1).softmax(-1), v, vg)


LOOKALIKES = (
    other_queries, other_names, some_are_not_summed, some_are_summed_twice, not_summed_up, changed_on_the_way, values_changed,
    keys_changed, masked_after, from_all_scores,
)  # fmt: skip


@pytest.mark.parametrize("function", LOOKALIKES)
def test_lookalikes_are_left_alone(function: Callable[..., Any]) -> None:
    given = operands()
    got, report = compiled(function, *given)
    assert rewritten(report) == 0
    assert_same(got, function(*given), 1e-11)
