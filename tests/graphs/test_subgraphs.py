"""Graphs inside a graph: attention in checkpointed layers, in branches and in nested compiles is seen, rewritten and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled, dynamo_graph
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnfx import testing
from attnfx.backend import rewrite
from attnfx.graphs.subgraphs import regions
from attnfx.options import Options


class Layer(nn.Module):
    """Masked self-attention over x (B, S, 8) with two heads, written out."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(8, 24), dropout

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * 0.5).masked_fill(~keep, float("-inf")).softmax(-1)
        return x + (F.dropout(weights, self.dropout) @ v).transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    """Two layers, each recomputed in the backward pass; the mask is built once, outside of them."""

    def __init__(self, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers, self.reentrant = nn.ModuleList([Layer(dropout) for _ in range(2)]), reentrant

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        keep = (i[:, None] >= i) & pad[:, None, None, :]
        for layer in self.layers:
            x = checkpoint(layer, x, keep, use_reentrant=self.reentrant)
        return x


def inputs(length: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, length, 8, requires_grad=True), torch.arange(length) < torch.tensor([[length], [5]])


def gradients(call: Callable[..., Tensor], model: nn.Module, x: Tensor, pad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    x.grad = None
    model.zero_grad()
    out = call(x, pad)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    return out.detach(), [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("reentrant", "dynamic", "inner"), [(False, False, "eager"), (False, True, "aot_eager"), (True, False, "aot_eager")]
)
def test_checkpointed_layers(reentrant: bool, dynamic: bool, inner: str) -> None:
    x, pad = inputs()
    model = Checkpointed(reentrant)
    torch._dynamo.reset()
    options = {"inner": inner, "strict": True, "strict_sites": 2}
    call = torch.compile(model, backend="attnfx", dynamic=dynamic, fullgraph=True, options=options)
    for length in (7, 5) if dynamic else (7,):
        part = x.detach()[:, :length].clone().requires_grad_()
        got = gradients(call, model, part, pad[:, :length])
        assert_same(got, gradients(model, model, part, pad[:, :length]), 2e-5)


def test_a_mask_from_outside_is_proved_inside_and_never_built() -> None:
    x, pad = inputs(40)
    gm = dynamo_graph(Checkpointed(False), x, pad)
    before = str(gm.graph), [str(r.module.graph) for r in regions(gm)]
    after, report = rewrite(gm, Options(strict=True))
    assert [s.site.facts.causal for s in report.sites] == [True, True]
    assert [s.module for s in report.sites] == ["layers.0", "layers.1"]
    assert len({s.name for s in report.sites}) == 2
    assert (str(gm.graph), [str(r.module.graph) for r in regions(gm)]) == before, "the caller's graphs stay as they were"
    assert not testing.square_tensors(after, 40)
    assert not any(n.target is torch.arange for n in after.graph.nodes)
    for region in regions(after):
        assert sum("attnfx" in str(n.target) for n in region.module.graph.nodes) == 1
        assert len(region.module.graph.find_nodes(op="placeholder")) == len(region.node.args) - 1


def test_a_mask_that_is_written_to_is_not_computed_again() -> None:
    def attend(x: Tensor, keep: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ x

    def outer(x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        keep[0, 3] = True
        return checkpoint(attend, x, keep, use_reentrant=False)

    x = torch.randn(2, 6, 4, requires_grad=True)
    got, report = compiled(outer, x)
    assert len(report.sites) == 1
    assert_same(got, outer(x))


def test_the_layers_are_computed_again_in_the_backward_pass() -> None:
    x, pad = inputs()
    model = Checkpointed(False)
    log = testing.AtenLog()
    torch._dynamo.reset()
    out = torch.compile(model, backend="attnfx", options={"inner": log, "strict": True})(x, pad)
    out.sum().backward()
    flash = [sum(n.target is torch.ops.attnfx.flash.default for n in graph.graph.nodes) for graph in log.graphs]
    assert flash == [2, 2], "the forward graph, and the backward graph once more"


def test_dropout_is_drawn_alike_when_a_layer_is_computed_again() -> None:
    """The result is linear in the values, so the sum of (gradient of the values) * values is that of the result.

    (Run by "eager", torch's own operator of checkpoints keeps no random state.)
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), 0.4) @ v

    q, k, v = torch.randn(3, 2, 3, 9, 4).requires_grad_().unbind()
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "strict_sites": 1}
    call = torch.compile(lambda q, k, v: checkpoint(attend, q, k, v, use_reentrant=False), backend="attnfx", options=options)
    for _ in range(3):
        out = call(q, k, v)
        weight = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, v, weight)
        torch.testing.assert_close((grad * v).sum(), (out * weight).sum(), rtol=1e-4, atol=1e-4)


def attend(x: Tensor) -> Tensor:
    return (x @ x.transpose(-1, -2).contiguous()).softmax(-1) @ x


def test_both_branches_of_cond() -> None:
    def choose(x: Tensor) -> Tensor:
        found: Tensor = torch.cond(x.sum() > 0, attend, lambda x: attend(2 * x), (x,))
        return found

    x = torch.linspace(-1, 1.5, 40).view(2, 5, 4)
    for sign in (1, -1):
        got, report = compiled(choose, sign * x, inner="aot_eager", verify="first")
        assert len(report.sites) == 2
        assert_same(got, choose(sign * x))
        assert [bool(s.measured and s.measured.note) for s in report.sites] == [sign < 0, sign > 0]


def test_a_nested_compile_region() -> None:
    region: Any = torch.compiler.nested_compile_region(attend)
    x = torch.randn(2, 5, 4)
    got, report = compiled(lambda x: region(region(x)), x, inner="aot_eager")
    assert len(report.sites) == 1
    assert_same(got, attend(attend(x)))
