"""Every attention of every model is found, explained and rewritten, and no S x S tensor is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager, boxed_nop

import attnfx
from attnfx.testing import GraphLog, peak_bytes, square_tensors
from tests.models import compare
from tests.models.zoo import NEVER_SQUARE, ZOO

LONG = 2113  # longer than every width of the models and than every tile, so that only S x S has two such axes
GROWTH = 2.3  # of the peak of memory with twice the length


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ZOO)
def test_every_site_is_found_and_explained(name: str, training: bool) -> None:
    case = ZOO[name]
    model, kwargs = case.build()
    with torch.set_grad_enabled(training):
        report = attnfx.explain(model.train(training), **kwargs)
    found = [site.module for site in report.sites]
    if training and case.layer_by_layer:
        assert found, f"{name}: nothing was found, missed {[m.reason for m in report.missed]}"
        modules = {part for module in dict(model.named_modules()) for part in (module, module.rpartition(".")[2])}
    else:
        assert len(found) == case.sites, f"{name}: found {found}, missed {[m.reason for m in report.missed]}"
        modules = set(dict(model.named_modules()))
    for site in report.sites:
        assert site.exact, f"{name}: {site.module} is not exact though no policy asked for that"
        assert site.module in modules, f"{name}: {site.module!r} is no module of the model"
        assert site.decision, f"{name}: {site.module} has no decision"
        assert site.decision != "kept", f"{name}: {site.module} was left alone: {site.reason}"
        assert len(site.reason.split()) > 2, f"{name}: {site.module} has no reason that is a sentence: {site.reason!r}"
        own = site.module.rpartition(".")[2]  # equal layers share a line, so that the whole path need not be there
        assert own in str(report), f"{name}: the printed report does not name {site.module}"


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("name", NEVER_SQUARE)
def test_no_square_tensor_after_rewriting(name: str, mask: str) -> None:
    model, kwargs = ZOO[name].build(length=LONG, batch=1 if mask == "none" else 2, mask=mask)
    log = GraphLog()
    with torch.no_grad():
        compare.compiled(model, inner=log)(**kwargs)
    assert log.graphs, "the inner backend was never called"
    squares = [square_tensors(gm, LONG - 8) for gm in log.graphs]
    assert not any(squares), f"{name}: S x S tensors in the rewritten graph: {squares}"


def test_square_tensors_finds_what_eager_models_hold() -> None:
    """The helper must be able to fail: an untouched graph of the same model is full of S x S tensors."""
    model, kwargs = ZOO["llama-eager"].build(length=301, batch=1)
    log = GraphLog()
    with torch.no_grad():
        torch.compile(model, backend=log)(**kwargs)
    recorded = square_tensors(log.graphs[0], 301)
    assert len(recorded) > 5
    for node in log.graphs[0].graph.nodes:
        if node.op.startswith("call"):
            node.meta.pop("example_value", None)
    assert square_tensors(log.graphs[0], 301) == recorded, "shapes propagated anew differ from those recorded"


@dataclass
class AotEagerLog(GraphLog):
    """What "aot_eager" runs, and the graphs of ATen operators, forward and backward, where what our lowering expands to shows."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def keep(aten: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self.graphs.append(aten)
            return boxed_nop(aten, inputs)

        return aot_eager(gm, list(example_inputs), fw_compiler=keep, bw_compiler=keep)


def least_peak(step: Callable[[], object], enough: float = 0.0) -> int:
    """The least of two measured peaks, or the first where that is small enough."""
    found = peak_bytes(step)
    return found if found <= enough else min(found, peak_bytes(step))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NEVER_SQUARE)
def test_memory_grows_linearly_and_no_operator_makes_a_square_tensor(name: str, training: bool) -> None:
    """Twice the length takes about twice the memory; with one S x S tensor of bytes it would take three times."""
    peaks: list[int] = []
    for length in (LONG, 2 * LONG):
        torch._dynamo.reset()
        model, kwargs = ZOO[name].build(length=length, batch=1)
        model.train(training)
        log = AotEagerLog()
        call = compare.compiled(model, inner=log)
        step = partial(compare.gradients, model, call, kwargs) if training else partial(call, **kwargs)
        with torch.set_grad_enabled(training):
            step()
            peaks.append(least_peak(step, enough=GROWTH * peaks[0] if peaks else 0.0))
        assert len(log.graphs) >= 1 + training, "no forward and backward graph was seen"
        squares = [square_tensors(gm, length - 8) for gm in log.graphs]
        assert not any(squares), f"{name}: S x S tensors in the compiled graphs: {squares}"
    assert peaks[1] <= GROWTH * peaks[0], f"{name}: peak grew {peaks[1] / peaks[0]:.2f} times: {peaks} bytes"


@pytest.mark.parametrize("name", ["llama-sdpa"])
def test_memory_grows_linearly_through_inductor(name: str) -> None:
    peaks: list[int] = []
    for length in (LONG, 2 * LONG):
        torch._dynamo.reset()
        model, kwargs = ZOO[name].build(length=length, batch=1)
        call = compare.compiled(model)
        with torch.no_grad():
            call(**kwargs)
            peaks.append(least_peak(partial(call, **kwargs), enough=GROWTH * peaks[0] if peaks else 0.0))
    assert peaks[1] <= GROWTH * peaks[0], f"{name}: peak grew {peaks[1] / peaks[0]:.2f} times: {peaks} bytes"
