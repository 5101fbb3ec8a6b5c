"""Attentions read through in-place edits: the rewritten graph against the original in float64, gradients too."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edits import Program, later, tensor
from graphs import assert_same, compiled, dynamo_graph
from torch import Tensor

from attnfx.backend import rewrite
from attnfx.options import Options
from attnfx.report import Report

B, H, M, N, D = 2, 3, 6, 8, 4
LOW = torch.finfo(torch.float32).min


SHAPES = ((B, H, M, D), (B, H, N, D), (B, H, N, D), (H, M, N))


def operands(grad: bool = False) -> list[Tensor]:
    """q, k, v and a bias (H, M, N)."""
    return [tensor(seed, *shape).requires_grad_(grad) for seed, shape in enumerate(SHAPES)]


def with_a_fixed_bias(grad: bool) -> list[Tensor]:
    return [t.requires_grad_(grad and k < 3) for k, t in enumerate(operands())]


def backward(result: Any) -> None:
    parts = result if isinstance(result, tuple) else (result,)
    sum((p * tensor(7, *p.shape)).sum() for p in parts if p.requires_grad).backward()


def check(f: Callable[..., Any], sites: int | None = 1, grad: bool = True, args: Callable[..., list[Tensor]] = operands) -> Report:
    """``f`` compiled gives what ``f`` gives, in value and gradient, and has so many attentions rewritten (None: any)."""
    ours, theirs = args(grad), args(grad)
    want = f(*theirs)
    got, report = compiled(f, *ours)
    assert_same(got, want, 1e-9)
    assert sites is None or len(report.sites) == sites, [m.reason for m in report.missed]
    if grad:
        try:
            backward(want)
        except RuntimeError:
            return report  # autograd has no gradient either: what it saved was written to
        backward(got)
        assert_same([t.grad for t in ours], [t.grad for t in theirs], 1e-8)
    assert_same([t.detach() for t in ours], [t.detach() for t in theirs])
    return report


@pytest.mark.parametrize("seed", range(8))
def test_scores_edited_in_place(seed: int) -> None:
    program = Program.draw(random.Random(seed), (B, H, M, N), 1 + seed % 3)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.5 + bias
        program.run(s)
        return s.softmax(-1) @ v

    check(f, sites=None)


@pytest.mark.parametrize("seed", range(8))
def test_bias_edited_in_place(seed: int) -> None:
    program = Program.draw(random.Random(100 + seed), (H, M, N), 1 + seed % 3)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        bias = bias.clone()
        program.run(bias)
        return (q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v

    check(f, args=with_a_fixed_bias)
    check(f, sites=None)


@pytest.mark.parametrize("seed", range(6))
def test_bias_edited_before_and_after_it_is_read(seed: int) -> None:
    rng = random.Random(200 + seed)
    before, after = (Program.draw(rng, (H, M, N), 2) for _ in range(2))

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        bias = torch.sinh(bias) if seed % 2 else bias.clone()
        before.run(bias)
        s = q @ k.transpose(-1, -2) * 0.5 + bias
        after.run(bias)
        return s.softmax(-1) @ v, bias

    check(f, args=with_a_fixed_bias)
    check(f, sites=None)


@pytest.mark.parametrize("seed", range(5))
def test_scores_edited_after_the_softmax_read_them(seed: int) -> None:
    program = Program.draw(random.Random(300 + seed), (B, H, M, N), 2)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.transpose(-1, -2) * 0.5 + bias
        s.masked_fill_(later(s), LOW)
        p = s.softmax(-1)
        program.run(s)
        return p @ v, s

    check(f)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_operands_edited_around_the_scores(which: int, when: str) -> None:
    program = Program.draw(random.Random(400 + which), SHAPES[which], 2)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        given = [q.clone(), k.clone(), v.clone()]
        views = [t.transpose(1, 2).transpose(2, 1) for t in given]
        if when == "before":
            program.run(given[which])
        p = (views[0] @ views[1].transpose(-1, -2) + bias).softmax(-1)
        if when == "between":
            program.run(given[which])
        out = p @ views[2]
        if when == "after":
            program.run(given[which])
        return out + given[which].sum()

    check(f, grad=when == "before")


def test_an_edit_of_the_caller_s_keys_between_scores_and_values_is_seen_and_undone() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        k.zero_()
        v.mul_(2)
        return p @ v

    check(f, grad=False)
    gm = dynamo_graph(f, *operands())
    graph, _ = rewrite(gm, Options(strict=True))
    assert [n.name for n in graph.graph.nodes if "clone" in n.name] == ["clone_default"], "the keys alone are copied"


def test_probabilities_edited_before_the_values() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        p[..., :2] = 0
        return p @ v

    def through_a_diagonal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        p.diagonal(0, -2, -1).zero_()
        return p @ v

    def numerator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        e = (s - s.amax(-1, keepdim=True)).exp()
        e[..., :2] = 0
        return (e / e.sum(-1, keepdim=True)) @ v

    for f, sites in ((sliced, 1), (through_a_diagonal, 1), (numerator, 0)):
        check(f, sites=sites, grad=False)


def test_probabilities_edited_after_the_values() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        out = p @ v
        p[..., :2] = 0
        return out

    check(f, grad=False)


def test_a_detached_edit_keeps_the_gradient_of_eager() -> None:
    def data(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) + bias
        s.detach()[..., :3].fill_(0.5)
        return s.softmax(-1) @ v

    def under_no_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = bias * 2
        with torch.no_grad():
            s[..., :3] *= 3
        return (q @ k.transpose(-1, -2) + s).softmax(-1) @ v

    check(data, sites=None)
    check(under_no_grad, sites=None)


def test_inputs_that_share_memory_are_read_as_they_were() -> None:
    memory = tensor(9, H, M, N + 1)

    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) + a
        b.mul_(3)
        return (s + a).softmax(-1) @ v

    def args(_: bool) -> list[Tensor]:
        shared = memory.clone()
        return [*operands()[:3], shared[..., 1:], shared[..., :-1]]

    check(f, sites=None, grad=False, args=args)


def formula(f: Callable[..., Tensor], *args: Tensor) -> str:
    return str(compiled(f, *args)[1].sites[0].site)


def test_edits_become_formulas() -> None:
    def window(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        keep = torch.ones(N, N, dtype=torch.bool)
        keep.tril_()
        keep[:, :2] = False
        keep.fill_diagonal_(True)
        return F.scaled_dot_product_attention(k, k, v, keep)

    def padded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        s[..., 5:] = -torch.inf
        return s.softmax(-1) @ v

    def painted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        region = torch.zeros(1, 4, 4, 1, dtype=torch.int64)
        for count, (rows, columns) in enumerate(((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(3, 4)))):
            region[:, rows, columns, :] = count + 1
        region = region.view(-1)[:N]
        return (k @ k.transpose(-1, -2)).masked_fill(region[:, None] != region, -1e9).softmax(-1) @ v

    assert "j ≤ 4" in formula(padded, *operands())
    assert "T0" not in formula(window, *operands())
    assert "T0" not in formula(painted, *operands())
    for f in (window, padded, painted):
        check(f)


def test_a_written_out_argument_is_data() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        m = torch.zeros(M, N, dtype=torch.float64)
        torch.mul(bias[0].detach(), 2, out=m)
        return (q @ k.transpose(-1, -2) + m).softmax(-1) @ v

    check(f, grad=False)


def test_averaged_weights_that_nobody_reads_do_not_hinder() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = tensor(3, 2, 5, 8)
    got, report = compiled(lambda x: attention(x, x, x)[0], x)
    assert len(report.sites) == 1
    assert_same(got, attention(x, x, x)[0])
    got, report = compiled(lambda x: attention(x, x, x), x)
    assert "probabilities are also used" in report.sites[0].reason
    assert_same(got, attention(x, x, x))


def test_probabilities_kept_for_nobody_are_removed() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        kept = torch.zeros(B, H, M, N)
        kept[:, :, 1:] = p[:, :, 1:]
        kept.mean()
        return p @ v

    check(f)
    graph, _ = rewrite(dynamo_graph(f, *operands()), Options(strict=True))
    assert not [n for n in graph.graph.nodes if "softmax" in n.name or "zeros" in n.name or "setitem" in n.name]


def test_probabilities_kept_for_somebody_are_computed_for_it() -> None:
    def local(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        kept = torch.zeros(B, H, M, N, dtype=p.dtype)
        kept[:, :, 1:] = p[:, :, 1:]
        return p @ v + kept.sum()

    def of_the_caller(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        bias.copy_(p[0])
        return p @ v

    check(local)
    check(of_the_caller, grad=False)
