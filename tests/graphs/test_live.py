"""The report of what a compiled model really ran, and what differs between two reports."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from windowed import Windowed

import attnfx
from attnfx.errors import AttnfxError
from attnfx.report import Missed, Report


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Windowed(), Windowed())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _inputs(length: int = 13) -> Tensor:
    return torch.randn(2, length, 16)


@pytest.fixture(autouse=True)
def _reset() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_every_compile_is_in_the_report_with_its_reason() -> None:
    compiled = attnfx.compile(Model(), inner="eager")
    assert compiled.attnfx_report is None
    compiled(_inputs(13))
    first = compiled.attnfx_report
    compiled(_inputs(17)), compiled(_inputs(19))  # the second size is compiled as a symbol, which holds for the third
    report = attnfx.explain(compiled)
    assert report == compiled.attnfx_report
    assert [(c.graph, c.attentions) for c in report.compiles] == [("0/0", 2), ("0/1", 2)]
    assert report.compiles[0] == first.compiles[0]
    assert report.compiles[0].reason == ""
    assert "size mismatch" in report.compiles[1].reason
    assert "Model.forward" in report.compiles[0].function
    assert f"{__file__}:" in report.compiles[0].function
    assert report.compiles[0].at < report.compiles[1].at
    assert len(first.sites) == 2
    assert len(report.sites) == 4
    text = str(report)
    assert "Compiled:\n  [0/0] " in text
    assert "compiled anew because of 0/0: " in text
    assert max(map(len, text.splitlines())) <= 100


def test_each_compiled_model_has_reports_of_its_own() -> None:
    options = {"inner": "eager"}
    one, other = (torch.compile(Model(), backend=attnfx.backend.attnfx, options=options) for _ in range(2))
    one(_inputs())
    assert len(attnfx.explain(one).sites) == 2
    with pytest.raises(AttnfxError, match="or Dynamo took over"):
        attnfx.explain(other)
    with pytest.raises(AttnfxError, match="has not run yet"):
        attnfx.explain(copy.deepcopy(one))


def test_inputs_are_run_first_and_a_policy_asks_for_something_else() -> None:
    model = Model()
    compiled = attnfx.compile(model, inner="eager")
    ran = attnfx.explain(compiled, _inputs())
    assert [c.graph for c in ran.compiles] == ["0/0"]
    asked = attnfx.explain(compiled, _inputs(), policy=[attnfx.Rule("layers.1", attnfx.variants.SlidingWindow(3))])
    assert asked.compiles == ()
    assert [site.exact for site in asked.sites] == [True, False]
    assert attnfx.explain(compiled) == ran


def test_a_module_compiled_in_place_and_a_function() -> None:
    model = Model()
    model.compile(backend=attnfx.backend.attnfx, options={"inner": "eager"})
    model(_inputs())
    assert [site.module for site in attnfx.explain(model).sites] == ["layers.0", "layers.1"]
    asked = attnfx.explain(model, _inputs(), policy=[attnfx.Rule("layers.1", attnfx.variants.SlidingWindow(3))])
    assert [(site.module, site.exact) for site in asked.sites] == [("layers.0", True), ("layers.1", False)]
    inside = Model()
    compiled = attnfx.compile(lambda x: inside(x), inner="eager", strict_sites=2)
    compiled(_inputs())
    assert len(compiled.attnfx_report.sites) == 2
    assert attnfx.explain(compiled) == compiled.attnfx_report


def test_graph_breaks_are_several_compiles() -> None:
    first, second = Windowed(), Windowed()

    def broken(x: Tensor) -> Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    compiled = attnfx.compile(broken, inner="eager")
    compiled(_inputs())
    report = attnfx.explain(compiled)
    assert [c.attentions for c in report.compiles] == [1, 1]
    assert len({c.graph for c in report.compiles}) == 2
    assert len(report.breaks) == 1


def test_diff_says_what_runs_otherwise() -> None:
    model, x = Model(), _inputs()
    plain = attnfx.explain(model, x)
    windows = attnfx.explain(model, x, policy=[attnfx.Rule("*", attnfx.variants.SlidingWindow(3))])
    reason = "its mask is read by another program."
    kept = Report(plain.sites[:1], missed=(Missed("layers.1", reason, "softmax"),))
    assert plain.diff(plain) == "Nothing runs otherwise: 2 attentions the same."
    assert plain.diff(windows).splitlines() == [
        "2 attentions changed, 0 in one report only, 0 the same.",
        "layers.[0-1] ×2",
        "  variant: the model's own attention -> SlidingWindow(window=3, sinks=0)",
        "  result: exact -> approximate, training-free",
        "  formula: softmax((q·k)·0.353553 | causal ∧ i - j ≤ 5) v  [B=2 H=2 M=N=13 D=8 fp32]",
        "    -> softmax((q·k)·0.353553 | causal ∧ i - j ≤ 2) v  [B=2 H=2 M=N=13 D=8 fp32]",
    ]
    assert plain.diff(kept).splitlines() == [
        "0 attentions changed, 1 in one report only, 1 the same.",
        "layers.1",
        "  in the first report only, as portable; left as it was in the other: its mask is read by another",
        "    program.",
    ]
    assert "in the second report only" in kept.diff(plain)
    assert Report(()).diff(Report(())) == "Nothing runs otherwise: 0 attentions the same."
