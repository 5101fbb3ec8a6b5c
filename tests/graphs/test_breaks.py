"""What Dynamo leaves out of every graph is named, with its line and Dynamo's reason."""

import json

import torch
from torch import Tensor

import attnfx
from attnfx.graphs.breaks import Break
from attnfx.report import Report


def _broken(q: Tensor) -> Tensor:
    q = q + 1
    torch._dynamo.graph_break("too deep for a graph")
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def _whole(q: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_a_break_is_in_the_report() -> None:
    report = attnfx.explain(_broken, torch.randn(1, 2, 8, 4))
    found = [b for b in report.breaks if "graph_break" in b.source]
    assert len(found) == 1, report.breaks
    assert "test_breaks.py:" in found[0].source
    assert found[0].reason
    text = str(report)
    assert "not seen" in text
    assert found[0].source in text.replace("\n", " ") or found[0].source[:60] in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(report.to_json())["breaks"][0]["source"] == found[0].source


def test_a_break_before_any_operation_is_in_the_report() -> None:
    """Dynamo hands over no graph for it, so that its line is not known."""

    def at_once(q: Tensor) -> Tensor:
        torch._dynamo.graph_break("before anything")
        return _whole(q)

    assert [b.source for b in attnfx.explain(at_once, torch.randn(1, 2, 8, 4)).breaks] == [""]


def test_whole_functions_have_none() -> None:
    report = attnfx.explain(_whole, torch.randn(1, 2, 8, 4))
    assert report.breaks == ()
    assert "not seen" not in str(report)


def test_equal_breaks_are_said_once() -> None:
    both = Report.merge([Report((), breaks=(Break("a.py:3: f()", "because"),))] * 2)
    assert both.breaks == (Break("a.py:3: f()", "because"),)
