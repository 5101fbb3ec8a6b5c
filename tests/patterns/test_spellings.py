"""Spellings of attention seen in real code, and look-alikes: what each is recognised as, and that nothing changes in value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor

B, H, S, D = 2, 4, 15, 8
NINF = float("-inf")
LOW = torch.finfo(torch.float32).min
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()


@dataclass(frozen=True)
class Spelling:
    """A function, its arguments, and the formula that its site must have; None where it must be left alone."""

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((B, H, S, D),) * 3
    formula: str | None = "softmax((q·k)·0.2 | full)"
    extra: tuple[Any, ...] = ()
    dtype: torch.dtype = torch.float32

    def arguments(self) -> tuple[Any, ...]:
        torch.manual_seed(0)
        extra = (e.clone() if isinstance(e, Tensor) else e for e in self.extra)  # a test may ask for their gradients
        return (*(torch.randn(shape).to(self.dtype) for shape in self.shapes), *extra)


def scores(q: Tensor, k: Tensor, scale: float = 0.2) -> Tensor:
    return q @ k.transpose(-2, -1) * scale


def swap(*tensors: Tensor) -> list[Tensor]:
    return [t.permute(0, 2, 1, 3) for t in tensors]


def heads_last(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, *rest: function(*swap(q, k, v), *rest)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(S)
    inside = (i[:, None] >= i) & (i[:, None] - i < 4)
    return scores(q, k).masked_fill(~inside, NINF).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i = torch.arange(S)
    s = scores(q, k) + slopes[:, None, None] * (i - i[:, None])
    return s.masked_fill(i > i[:, None], NINF).softmax(-1) @ v


def gpt2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    q, k, v = swap(q, k, v)
    w = q @ k.transpose(-1, -2) / torch.full([], v.size(-1) ** 0.5)
    w = torch.where(mask[:, :, :S, :S], w, torch.full([], LOW))
    return w.softmax(-1) @ v, k, v


def bloom(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (t.reshape(B * H, S, D) for t in (q, k, v))
    s = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.2).view(B, H, S, S)
    i = torch.arange(S)
    s = s + torch.where(i <= i[:, None], 0.0, LOW)
    p = s.softmax(-1, dtype=torch.float32).view(B * H, S, S)
    return torch.bmm(p, v).view(B, H, S, D).permute(0, 2, 1, 3).reshape(B, S, H * D)


def swin(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    s = (scores(q, k) + bias).view(1, B, H, S, S) + mask[None, :, None]
    return s.view(B, H, S, S).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = scores(q, k)
    s += bias
    s.masked_fill_(~CAUSAL, NINF)
    return s.softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :, None].expand(B, 2, 4, S, D).reshape(B, 8, S, D) for t in (k, v))
    return scores(q, k).softmax(-1) @ v


def with_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores(q, k).softmax(-1)
    return p @ v, p


def relative_values(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    return p @ v + torch.einsum("bhij,ijd->bhid", p, table)


def talking_heads(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    return torch.einsum("gh,bhij->bgij", mix, scores(q, k)).softmax(-1) @ v


SHARED = ((B, 8, S, D), (B, 2, S, D), (B, 2, S, D))
SPELLINGS: dict[str, Spelling] = {
    "divide": Spelling(lambda q, k, v: (q @ k.transpose(-2, -1) / 5.0).softmax(-1) @ v),
    "multiply": Spelling(lambda q, k, v: scores(q, k).softmax(-1) @ v),
    "no scale": Spelling(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v, formula="softmax(q·k | full)"),
    "scale on q": Spelling(lambda q, k, v: ((q * 0.2) @ k.transpose(-2, -1)).softmax(-1) @ v),
    "scale on k": Spelling(lambda q, k, v: (q @ (k * 0.2).transpose(-2, -1)).softmax(-1) @ v),
    "scale on both": Spelling(lambda q, k, v: ((q * 0.4) @ (k * 0.5).mT).softmax(-1) @ v),
    "heads last": Spelling(heads_last(lambda q, k, v: scores(q, k).softmax(-1) @ v)),
    "einsum": Spelling(
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.2).softmax(-1), v)
    ),
    "einsum, heads last": Spelling(
        lambda q, k, v: torch.einsum("bhij,bjhd->bihd", (torch.einsum("bihd,bjhd->bhij", q, k) * 0.2).softmax(-1), v)
    ),
    "einsum with an ellipsis": Spelling(
        lambda q, k, v: torch.einsum("... i j, ... j d -> ... i d", (torch.einsum("...id,...jd->...ij", q, k) * 0.2).softmax(-1), v)
    ),
    "einsum with ellipses of different rank": Spelling(
        lambda q, k, v: torch.einsum("...hij,...jd->...ihd", (torch.einsum("...ihd,...jd->...hij", q, k) * 0.2).softmax(-1), v),
        ((B, S, H, D), (S, D), (S, D)),
    ),
    "softmax over another axis, transposed": Spelling(lambda q, k, v: (k @ q.mT * 0.2).softmax(-2).mT @ v),
    "keys stored transposed": Spelling(
        lambda q, k, v: (q @ k.permute(0, 2, 3, 1) * 0.2).softmax(-1) @ v, ((B, H, S, D), (B, S, H, D), (B, H, S, D))
    ),
    "values of another width": Spelling(lambda q, k, v: scores(q, k).softmax(-1) @ v, ((B, H, S, D), (B, H, S, D), (B, H, S, 12))),
    "values with two axes of their own": Spelling(
        lambda q, k, v: torch.einsum("bhij,bhjdc->bihdc", scores(q, k).softmax(-1), v),
        ((B, H, S, D), (B, H, S, D), (B, H, S, 4, 3)),
    ),
    "several values for the same probabilities": Spelling(
        lambda q, k, v: torch.einsum("bhij,brjd->bhrid", scores(q, k).softmax(-1), v), ((B, H, S, D), (B, H, S, D), (B, 3, S, 5))
    ),
    "three dimensions": Spelling(
        lambda q, k, v: torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.2).softmax(-1), v), ((B, S, D),) * 3
    ),
    "five dimensions": Spelling(lambda q, k, v: scores(q, k).softmax(-1) @ v, ((2, 3, H, S, D),) * 3),
    "one query": Spelling(lambda q, k, v: scores(q, k).softmax(-1) @ v, ((B, H, 1, D), (B, H, S, D), (B, H, S, D))),
    "batch and head one": Spelling(lambda q, k, v: scores(q, k).softmax(-1) @ v, ((1, 1, S, D),) * 3),
    "grouped by expand": Spelling(repeated, SHARED),
    "grouped by repeat_interleave": Spelling(
        lambda q, k, v: scores(q, k.repeat_interleave(4, 1)).softmax(-1) @ v.repeat_interleave(4, 1), SHARED
    ),
    "one key head": Spelling(lambda q, k, v: scores(q, k).softmax(-1) @ v, ((B, H, S, D), (B, 1, S, D), (B, 1, S, D))),
    "groups as an axis": Spelling(
        lambda q, k, v: scores(q, k).softmax(-1) @ v, ((B, 2, 3, S, D), (B, 2, 1, S, D), (B, 2, 1, S, D))
    ),
    "written out": Spelling(written_out),
    "dropout in evaluation": Spelling(lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.1, False) @ v),
    "additive mask": Spelling(
        lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v,
        formula="softmax((q·k)·0.2 + T0[i, j] | full)",
        extra=(torch.zeros(S, S).masked_fill(~CAUSAL, NINF),),
    ),
    "scale after the mask": Spelling(
        lambda q, k, v, m: ((q @ k.mT + m) * 0.2).softmax(-1) @ v,
        formula="softmax((q·k + T0[i, j])·0.2 | full)",
        extra=(torch.randn(S, S),),
    ),
    "mask taken off": Spelling(
        lambda q, k, v, m: (scores(q, k) - 1e30 * torch.einsum("ijbn->bnij", (m > 0.5).float())).softmax(-1) @ v,
        formula="softmax((q·k)·0.2 | ¬(0.5 < T0[i, j, b, 0]) else +-1e+30)",
        extra=(torch.rand(S, S, B, 1),),
    ),
    "bias taken off": Spelling(
        lambda q, k, v, m: (scores(q, k) - m).softmax(-1) @ v,
        formula="softmax((q·k)·0.2 + T0[i, j]·-1 | full)",
        extra=(torch.randn(S, S),),
    ),
    "padding as an outer product": Spelling(
        lambda q, k, v, m: scores(q, k).masked_fill(torch.einsum("bi,bj->bij", m, m)[:, None] == 0, LOW).softmax(-1) @ v,
        formula="softmax((q·k)·0.2 | ¬(T0[b, i]·T0[b, j] = 0) else min(fp32))",
        extra=((torch.arange(S) < torch.tensor([[S], [S - 4]])).float(),),
    ),
    "two additive terms": Spelling(
        lambda q, k, v, m, b: (scores(q, k) + b + m).softmax(-1) @ v,
        extra=(torch.randn(S, S), torch.randn(H, S, S)),
        formula="softmax((q·k)·0.2 + T0[h, i, j] + T1[i, j] | full)",
    ),
    "causal from arange": Spelling(
        lambda q, k, v: torch.where(torch.arange(S)[:, None] >= torch.arange(S), scores(q, k), LOW).softmax(-1) @ v,
        formula="softmax((q·k)·0.2 | causal else min(fp32))",
    ),
    "window": Spelling(window, formula="softmax((q·k)·0.2 | causal ∧ i - j ≤ 3)"),
    "alibi": Spelling(alibi, formula="softmax((q·k)·0.2 + T0[h, 0, 0]·(j - i) | causal)", extra=(torch.rand(H),)),
    "gpt2 with its buffer": Spelling(
        gpt2,
        ((B, S, H, D),) * 3,
        "softmax((q·k)·0.353553 | T0[0, 0, i, j] else min(fp32))",
        (torch.ones(1, 1, 32, 32, dtype=torch.bool).tril(),),
    ),
    "bloom": Spelling(
        bloom, ((B, S, H, D),) * 3, "softmax((q·k)·0.2 + T0[4·b + h, 0, j] | causal else +min(fp32))", (torch.randn(B * H, 1, S),)
    ),
    "swin": Spelling(
        swin, formula="softmax((q·k)·0.2 + T0[h, i, j] + T1[b, i, j] | full)", extra=(torch.randn(H, S, S), torch.randn(B, S, S))
    ),
    "in place": Spelling(in_place, formula="softmax((q·k)·0.2 + T0[h, i, j] | T1[i, j])", extra=(torch.randn(H, S, S),)),
    "softcap": Spelling(
        lambda q, k, v: (torch.tanh(scores(q, k) / 50) * 50).softmax(-1) @ v, formula="softmax(tanh((q·k)·0.004)·50 | full)"
    ),
    "tensor scale": Spelling(
        lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v,
        formula="softmax((q·k)·T0[h, 0, 0] | full)",
        extra=(torch.rand(H, 1, 1) + 0.5,),
    ),
    "half, softmax in float32": Spelling(
        lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.float32).to(q.dtype) @ v, dtype=torch.bfloat16
    ),
    "upcast scores": Spelling(lambda q, k, v: scores(q.float(), k.float()).softmax(-1).to(v.dtype) @ v, dtype=torch.float16),
    "sdpa": Spelling(F.scaled_dot_product_attention, formula="softmax((q·k)·0.353553 | full)"),
    "sdpa causal, more keys": Spelling(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((B, H, 9, D), (B, H, S, D), (B, H, S, D)),
        "softmax((q·k)·0.353553 | causal)",
    ),
    "sdpa grouped": Spelling(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True), SHARED),
    "sdpa mask": Spelling(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.2),
        extra=(torch.rand(B, 1, 1, S) > 0.3,),
        formula="softmax((q·k)·0.2 | T0[b, 0, 0, j])",
    ),
    "learned keys and values": Spelling(
        lambda x, w, e: torch.einsum("bse,ed->bsd", (x @ w).softmax(-1), e), ((B, S, D), (D, 3), (3, D)), "softmax(q·k | full)"
    ),
    "relative values": Spelling(relative_values, extra=(torch.randn(S, S, D),)),
    # Not attention, or not one that can be replaced.
    "softmax over queries": Spelling(lambda q, k, v: scores(q, k).softmax(-2) @ v, formula=None),
    "softmax over heads": Spelling(lambda q, k, v: scores(q, k).softmax(1) @ v, formula=None),
    "probabilities returned": Spelling(with_probabilities, formula="softmax((q·k)·0.2 | full)"),
    "talking heads": Spelling(talking_heads, formula=None, extra=(torch.randn(H, H),)),
    "probabilities rescaled": Spelling(
        lambda q, k, v, m: (scores(q, k).softmax(-1) * m) @ v,
        formula="T0[0, h, 0, 0]·softmax((q·k)·0.2 | full)",
        extra=(torch.rand(1, H, 1, 1),),
    ),
    "features of linear attention": Spelling(lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), formula=None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_recognised_as(name: str) -> None:
    case = SPELLINGS[name]
    arguments = case.arguments()
    got, report = compiled(case.function, *arguments)
    assert_same(got, case.function(*arguments))
    found = [str(site.site).split("  [")[0] for site in report.sites if site.rewritten]
    assert found == ([] if case.formula is None else [f"{case.formula} v"])


@pytest.mark.parametrize("name", [n for n, case in SPELLINGS.items() if case.formula is not None and case.dtype == torch.float32])
def test_gradients(name: str) -> None:
    case = SPELLINGS[name]
    arguments = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.arguments()]
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]

    def first(result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result[0]

    got, report = compiled(case.function, *arguments, inner="aot_eager")
    want = first(case.function(*arguments))
    weight = torch.randn_like(want)
    assert len(report.sites) == 1
    got_grads, want_grads = (torch.autograd.grad(first(o), inputs, weight, allow_unused=True) for o in (got, want))
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("fill", [NINF, LOW, -1e4], ids=["-inf", "finfo.min", "-1e4"])
@pytest.mark.parametrize("additive", [False, True], ids=["replaced", "added"])
def test_rows_without_keys(fill: float, additive: bool) -> None:
    """A query that sees nothing gets what eager gives it: NaN, or the average over all keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, S, D).unbind()
    keep = torch.rand(B, 1, 1, S) > 0.5
    keep[1] = False

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = q @ k.mT / math.sqrt(D)
        return (s + torch.where(keep, 0.0, fill) if additive else s.masked_fill(~keep, fill)).softmax(-1) @ v

    got, report = compiled(attention, q, k, v, keep)
    assert len(report.sites) == 1
    assert_same(got, attention(q, k, v, keep))
