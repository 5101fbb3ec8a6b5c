"""Inductor as the inner compiler leaves alone what attnfx leaves alone, and other compiles know nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import assert_same
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from attnfx.backend import attnfx
from attnfx.graphs.inductor import Guard, Passes, compile_graph, patches


def as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Inductor's graph after its passes, run and not compiled."""
    return make_boxed_func(gm.forward)


def left_alone(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A graph in which nothing is rewritten, through Inductor's passes as attnfx has them."""
    return compile_fx(gm, list(inputs), inner_compile=as_it_is, config_patches=patches())


def by_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The same as Inductor has them."""
    return compile_fx(gm, list(inputs), inner_compile=as_it_is)


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 3.0).softmax(-2) @ v


def softmax_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(0) @ v


def a_row_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = (torch.arange(q.shape[0]) != 1).view(-1, 1, 1, 1).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (t.permute(0, 2, 1, 3) for t in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
    return torch.softmax((q @ k.transpose(-2, -1)).div(5.0).masked_fill(keep == 0, float("-inf")), -1) @ v


def where_with_a_row_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    keep = ((i[:, None] >= i) & (i[:, None] != 5))[None, None]
    w = q @ k.transpose(-1, -2) / torch.full([], 2.0)
    return torch.where(keep, w, torch.full([], torch.finfo(w.dtype).min)).softmax(-1) @ v


def permuted_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, v = q.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    return (torch.matmul(q, k.permute(0, 2, 3, 1)) * 0.3).softmax(-1) @ v


WRONG = (softmax_over_queries, softmax_over_batch, a_row_without_keys, where_with_a_row_without_keys, permuted_keys)


def inputs(grad: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(4, 8, 8, 8, requires_grad=grad) for _ in range(3))


def every(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(f(q, k, v) for f in WRONG)


@pytest.mark.parametrize("training", [False, True])
def test_what_stays_means_what_it_meant(training: bool) -> None:
    args = inputs(training)
    torch._dynamo.reset()
    counters.clear()
    got, want = torch.compile(every, backend=left_alone)(*args), every(*args)
    assert counters["inductor"]["fuse_attention"] == 0
    assert_same(got, want, 1e-5)
    if training:
        totals = [sum(t.nan_to_num(0).square().sum() for t in results) for results in (got, want)]
        assert_same(*(torch.autograd.grad(total, args) for total in totals), 1e-3)  # type: ignore[arg-type]


def test_a_refused_site_under_the_backend() -> None:
    args = inputs()
    torch._dynamo.reset()
    got = torch.compile(softmax_over_queries, backend=attnfx, options={"strict": True, "strict_sites": 0})(*args)
    assert_same(got, softmax_over_queries(*args))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 3.0).softmax(-1) @ v


def test_other_compiles_and_the_config_stay_as_they_were() -> None:
    args = inputs()
    before = config.joint_custom_pre_pass, config.joint_custom_post_pass
    fused = []
    for backend in (left_alone, by_inductor, left_alone):
        torch._dynamo.reset()
        counters.clear()
        with torch._functorch.config.patch(enable_autograd_cache=False), config.patch(fx_graph_cache=False):
            assert_same(torch.compile(plain, backend=backend)(*args), plain(*args))
        fused.append(counters["inductor"]["fuse_attention"])
    assert fused == [0, 1, 0]
    assert (config.joint_custom_pre_pass, config.joint_custom_post_pass) == before


def test_graphs_from_a_cache_keep_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor and attnfx compile one graph in one cache directory, and find there what is theirs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    args, found = inputs(), []
    for backend in ("inductor", lambda gm, given: compile_graph(gm, given, "default"), "inductor"):
        torch._dynamo.reset()
        counters.clear()
        assert_same(torch.compile(plain, backend=backend)(*args), plain(*args))
        found.append((counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fuse_attention"]))
    assert found == [(0, 1), (0, 0), (1, 0)]


def test_a_pass_of_the_callers_runs_as_well() -> None:
    seen: list[int] = []

    class Counts(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append(len(graph.nodes))

        def uuid(self) -> Any:
            return "counts"

    args = inputs()
    torch._dynamo.reset()
    with config.patch(joint_custom_pre_pass=Counts()):
        got = torch.compile(softmax_over_batch, backend=left_alone)(*args)
    assert seen
    assert_same(got, softmax_over_batch(*args))


def test_caches_tell_the_passes_apart() -> None:
    class Unnamed(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None: ...

        def uuid(self) -> Any:
            return None

    assert Passes(Guard()).uuid() == Passes((), Guard(), None).uuid()
    assert Passes(Guard()).uuid() != Passes().uuid()
    assert Passes(Unnamed(), Guard()).uuid() is None
    assert Passes(lambda graph: None).uuid() is None
