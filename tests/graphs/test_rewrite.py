"""Splicing: the graph after it holds one operator for each attention, nothing that only served the old one, and all the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import assert_same, compiled, dynamo_graph
from torch import Tensor, nn

from attnfx.backend import rewrite
from attnfx.options import Options


def targets(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op.startswith("call")]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s += bias
    i = torch.arange(s.shape[-1])
    s = s.masked_fill(i > i[:, None], float("-inf"))
    return s.softmax(-1) @ v


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (*torch.randn(3, 2, 3, 8, 4).unbind(), torch.randn(3, 8, 8))


def test_only_the_operator_is_left() -> None:
    gm = dynamo_graph(eager_attention, *inputs())
    before = targets(gm)
    after, report = rewrite(gm, Options(strict=True))
    assert len(report.sites) == 1
    assert targets(after) == ["attnfx.attention.default", "aten.contiguous.default"], (
        "the result is returned: its strides are eager's"
    )
    assert targets(gm) == before, "the caller's graph stays as it was"


def test_an_in_place_write_that_somebody_else_reads_stays() -> None:
    def leaks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.transpose(-1, -2)
        s += bias
        return s.softmax(-1) @ v, s

    args = inputs()
    got, report = compiled(leaks, *args)
    assert len(report.sites) == 1
    assert_same(got, leaks(*args))


def test_operands_changed_later() -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        v = v + 0
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        q = q.clone()
        out = p @ v
        v.zero_()
        return out + v + q * 0

    args = inputs()
    got, _ = compiled(changed, *args)
    assert_same(got, changed(*args))


def test_mask_changed_between_use_and_result() -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        bias = bias.cumsum(0)
        s = q @ k.transpose(-1, -2) + bias
        bias.zero_()
        return s.softmax(-1) @ v + bias

    args = (*inputs()[:3], torch.randn(8, 1))
    got, report = compiled(changed, *args)
    assert_same(got, changed(*args))
    assert len(report.sites) == 1, "the mask is copied before it is changed"


@pytest.mark.parametrize("tail", ["view", "reshape", "transpose then view", "as it is"])
def test_strides_that_somebody_reads(tail: str) -> None:
    def finish(out: Tensor) -> Any:
        if tail == "view":
            return out.view(2, -1)
        if tail == "transpose then view":
            return out.contiguous().transpose(0, 1).transpose(0, 1).view(2, -1)
        return out.reshape(2, -1) if tail == "reshape" else out

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return finish(eager_attention(q, k, v, bias))

    args = inputs()
    for inner in ("eager", "aot_eager"):
        got, report = compiled(attend, *args, inner=inner)
        want = attend(*args)
        assert len(report.sites) == 1
        assert_same(got, want)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_result_that_is_given_other_axes_in_place(inner: str, looked_at: bool) -> None:
    """Dynamo's example of such a result shows the later axes, not those that it was made with."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        out = eager_attention(q, k, v, bias)
        seen = out.view(2, -1) if looked_at else bias
        out.unsqueeze_(2)
        return torch.cat([out, out], 2), seen

    args = inputs()
    got, report = compiled(attend, *args, inner=inner)
    assert len(report.sites) == 1
    for a, b in zip(got, attend(*args), strict=True):
        assert_same(a, b)


def test_a_side_tensor_that_is_only_compared_gets_no_gradient() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.2).masked_fill(bias > 0.5, -1e4).softmax(-1) @ v

    args = [a.requires_grad_() for a in inputs()]
    got, report = compiled(attend, *args, inner="aot_eager")
    assert len(report.sites) == 1
    got.sum().backward()
    want = torch.autograd.grad(attend(*args).sum(), args[:3])
    assert args[3].grad is None
    for a, b in zip(args, want, strict=False):
        torch.testing.assert_close(a.grad, b, rtol=1e-4, atol=1e-5)


def test_equal_layers_share_one_plan() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            i = torch.arange(x.shape[-2])
            s = (x @ x.mT * 0.5).masked_fill(i > i[:, None], float("-inf"))
            return x + s.softmax(-1) @ x * (i >= 0)[:, None]

    class Window(Layer):
        def forward(self, x: Tensor) -> Tensor:
            i = torch.arange(x.shape[-2])
            keep = (i <= i[:, None]) & (i[:, None] - i < 3)
            return x + (x @ x.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ x

    model = nn.Sequential(Window(), Layer(), Window())
    x = torch.randn(2, 8, 4)
    got, report = compiled(model, x)
    assert_same(got, model(x))
    assert report.sites[0].site == report.sites[2].site
    assert [s.module for s in report.sites] == ["0", "1", "2"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_axes_of_every_kind_are_put_back(dynamic: bool) -> None:
    def shapes(x: Tensor) -> tuple[Tensor, ...]:
        b, s, _ = x.shape
        q, k, v = x.view(b, s, 3, 4, 6).unbind(2)
        heads_last = torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v)
        folded = [t.transpose(1, 2).reshape(b * 4, s, 6) for t in (q, k, v)]
        out = torch.bmm(torch.bmm(folded[0], folded[1].transpose(1, 2)).softmax(-1), folded[2])
        grouped = k.transpose(1, 2)[:, :2, None].expand(b, 2, 2, s, 6).reshape(b, 4, s, 6)
        shared = (q.transpose(1, 2) @ grouped.mT).softmax(-1) @ grouped
        return heads_last.flatten(2), out.view(b, 4, s, 6), shared

    x = torch.randn(3, 7, 72)
    got, report = compiled(shapes, x, dynamic=dynamic)
    assert len(report.sites) == 3
    assert_same(got, shapes(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sdpa", [False, True])
def test_autocast(sdpa: bool, training: bool) -> None:
    """The contractions of an autocast region run in its dtype, on a float32 model as on any other."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            if sdpa:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return eager_attention(q, k, v, bias)

    args = [t.requires_grad_(training) for t in inputs()]
    got, report = compiled(attend, *args, inner="aot_eager")
    want = attend(*args)
    assert [s.site.dtype for s in report.sites] == [torch.bfloat16]
    assert got.dtype == want.dtype == torch.bfloat16
    assert_same(got, want)
    if training:
        weight = torch.randn_like(want)
        wanted = args[:3] if sdpa else args
        assert_same(torch.autograd.grad(got, wanted, weight), torch.autograd.grad(want, wanted, weight), 5e-2)
