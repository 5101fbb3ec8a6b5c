"""Programs that the generator found to go wrong, each in its smallest form: outputs and gradients as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor

FOUND: list[Callable[..., Any]] = []


def found(f: Callable[..., Any]) -> Callable[..., Any]:
    FOUND.append(f)
    return f


@found
def copy_of_the_output_written(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    t = o.transpose(1, 2).contiguous()
    t.mul_(2.0)
    return o * 1, t


@found
def view_of_the_output_written(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    o = (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9).softmax(-1) @ v
    t = o.reshape(6, 5, 4)
    t.mul_(2.0)
    return o * 1, t


@found
def copy_written_in_training(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    o = (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9).softmax(-1) @ v
    o = o.transpose(1, 2).contiguous().view(2, 5, 12)
    o += 1.0
    return o


@found
def view_after_a_product(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    o = (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9).softmax(-1) @ v
    return (o * 2.0).to(v.dtype).view(6, 5, 4)


@found
def view_after_an_index(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    o = (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9).softmax(-1) @ v
    return o[0].view(15, 4) * 1, o.mT.movedim(-1, -2).view(6, 20) * 1


@found
def fill_in_place_under_a_band(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """Rows that see nothing but the fill: their sum is lost in a log-sum-exp of -1e9."""
    i = torch.arange(5)
    s = (q @ k.transpose(-1, -2)).masked_fill(i > 1, -1e9)
    return (s + torch.zeros(5, 5).masked_fill((i[:, None] - i).abs() > 1, float("-inf"))).softmax(-1) @ v


@found
def nothing_left_of_a_low_fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """A query without keys gives NaN, and its query a gradient of zero: the outer mask lets nothing through."""
    i = torch.arange(5)
    s = (q @ k.transpose(-1, -2)).masked_fill(i[None] > i[:, None], -1e4)
    return s.masked_fill((i[:, None] == 2) | ~keep, float("-inf")).softmax(-1) @ v


@found
def no_query_has_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """All of a block NaN: the mask still lets no gradient through to queries and keys."""
    hidden = v.detach()[..., :1].transpose(-1, -2) < 100.0
    return (q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def half_fill_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """Half precision adds in wide steps where a query has no keys: the scores are lost, or come out in eights."""
    return (q @ k.transpose(-1, -2) * 3.0 + (1.0 - keep.to(q.dtype)) * -1e4).softmax(-1) @ v


def half_fills_added_up(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """Two lowest numbers of float16 make -inf, and a query that has nothing else NaN; of bfloat16 too."""
    low = torch.where(keep, torch.zeros([], dtype=q.dtype), torch.finfo(q.dtype).min)
    return (q @ k.transpose(-1, -2) + low + (1.0 - keep.flip(1).to(q.dtype)) * torch.finfo(q.dtype).min).softmax(-1) @ v


def half_fill_in_a_fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    s = (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e4) + torch.where(keep.flip(1), 0.0, -1e4).to(q.dtype)
    return s.float().softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", [half_fill_added, half_fills_added_up, half_fill_in_a_fill])
def test_half_precision_of_queries_without_keys(f: Callable[..., Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 6, 4, dtype=dtype) for _ in range(3)]
    keep = (torch.rand(6, 6) > 0.5) & (torch.arange(6)[:, None] % 3 != 1)
    inputs = [[x.clone().requires_grad_() for x in given] for _ in range(2)]
    ours, report = compiled(f, *inputs[0], keep, inner="eager")
    eager = f(*inputs[1], keep)
    assert_same(ours, eager)
    weights = torch.arange(eager.numel()).reshape(eager.shape).sin()
    gradients = [torch.autograd.grad((o * weights).sum(), x) for o, x in zip((ours, eager), inputs, strict=True)]
    assert_same(*gradients, tolerance=6e-2)
    assert len(report.sites) == 1


@pytest.mark.parametrize("f", FOUND)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_same_as_eager(f: Callable[..., Any], inner: str) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    keep = torch.rand(5, 5) > 0.5
    keep[:, 0] = True

    def outcome(run: Callable[..., Any]) -> Any:
        inputs = [x.clone().requires_grad_() for x in given]
        outputs = run(*inputs, keep)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = torch.stack([(o * torch.arange(o.numel()).reshape(o.shape).sin()).sum() for o in outputs]).sum()
        return outputs, torch.autograd.grad(total, inputs)

    reports = []

    def ours(*inputs: Tensor) -> Any:
        result, report = compiled(f, *inputs, inner=inner)
        reports.append(report)
        return result

    assert_same(outcome(ours), outcome(f))
    assert len(reports[0].sites) == 1
