"""A user finds a layer's name in the timeline of torch.profiler, forward and backward."""

import time
from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from windowed import Windowed

import attnfx
from attnfx import Rule
from attnfx.graphs.inductor import patches
from attnfx.graphs.vendor_names import Named, Noted
from attnfx.lowering import timeline


def _seen(call: object) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        call()  # type: ignore[operator]
    return Counter(event.name for event in trace.events() if event.name.startswith("attnfx: "))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_each_layer_has_its_name(inner: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Windowed(), Windowed())
    compiled, x = attnfx.compile(model, inner=inner), torch.randn(2, 13, 16)
    compiled(x).sum().backward()
    assert _seen(lambda: compiled(x).sum().backward()) == Counter(
        {name: 1 for layer in "01" for name in (f"attnfx: {layer}", f"attnfx: {layer} (backward)")}
    )


class Plain(Windowed):
    """What torch has kernels for."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Linear(Windowed):
    """No softmax over the keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ((q.relu() @ k.relu().transpose(2, 3)) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("inner", "timeline"), [("eager", False), ("inductor", True)])
def test_torch_s_own_kernels_and_linear_attention_have_names(inner: str, timeline: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = nn.Sequential(Plain(), Linear(), Plain()), torch.randn(2, 70, 16)
    compiled = attnfx.compile(model, [Rule("2", attnfx.variants.LinearAttention())], inner=inner, timeline=timeline)
    compiled(x).sum().backward()
    assert {s.module: s.decision for s in compiled.attnfx_report.sites}["0"] == "vendor"
    assert {s.module: s.decision for s in compiled.attnfx_report.sites}["1"] == "linear"
    assert _seen(lambda: compiled(x)) == Counter(f"attnfx: {name}" for name in "012")
    if timeline:
        out = compiled(x)
        assert _seen(lambda: out.sum().backward()) == Counter(f"attnfx: {name} (backward)" for name in "012")


def test_torch_s_own_kernels_are_called_plainly_where_nobody_asks_for_names() -> None:
    found = patches("default", ())
    assert "post_grad_custom_post_pass" not in found
    graph = fx.Graph()
    x = graph.placeholder("x")
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    ours, model_s = (graph.call_function(kernel, (x, x, x)) for _ in range(2))
    ours.meta["custom"] = {timeline.NOTE: "layers.3"}
    for run in (Noted(("layers.3",)), Named(("layers.3",))):
        run(graph)
    assert (str(ours.target), ours.kwargs) == (f"attnfx.named{kernel._schema.name[6:]}.default", {"site": "layers.3"})
    assert (model_s.target, model_s.kwargs) == (kernel, {})
    assert Named(("layers.3",)).uuid() != Named(("layers.4",)).uuid()


def _windowed(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril().triu(-5)
    return nn.functional.scaled_dot_product_attention(x, x, x, mask)


def test_a_region_that_is_run_twice_has_no_name() -> None:
    region = torch.compiler.nested_compile_region(_windowed)
    compiled, x = attnfx.compile(lambda x: region(region(x)), inner="aot_eager"), torch.randn(1, 2, 13, 8)
    once = attnfx.compile(lambda x: region(x), inner="aot_eager")
    with torch.no_grad():
        compiled(x), once(x)
        assert sum(_seen(lambda: once(x)).values()) == 1
        assert _seen(lambda: compiled(x)) == Counter()


def test_nothing_is_paid_without_a_profiler() -> None:
    assert timeline.named("layers.3") is timeline.named("layers.4")
    started = time.perf_counter()
    for _ in range(10_000):
        timeline.named("layers.3")
    assert time.perf_counter() - started < 1.0
