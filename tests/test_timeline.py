"""A user finds a layer's name in the timeline of torch.profiler, forward and backward."""

import time
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from windowed import Windowed

import attnfx
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
