"""`strict_sites`: the number of rewritten attentions of a model, whole or broken into graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfx
from attnfx.errors import AttnfxWarning, SiteCountError


class Layer(nn.Module):
    def __init__(self, breaks: bool, wrong: bool = False) -> None:
        super().__init__()
        self.breaks, self.wrong = breaks, wrong

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ x.mT).softmax(-2 if self.wrong else -1) @ x if self.wrong else F.scaled_dot_product_attention(x, x, x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x


X = torch.linspace(-1, 1, 40).view(2, 5, 4)


def model(breaks: bool, wrong: int = 0) -> nn.Module:
    return nn.Sequential(Layer(breaks), Layer(breaks), Layer(False, wrong=True) if wrong else Layer(False))


def run(m: Any, calls: int = 1, **options: Any) -> None:
    torch._dynamo.reset()
    call = torch.compile(m, backend="attnfx", options={"inner": "eager", **options})
    for _ in range(calls):
        call(X)


def error_of(call: Any) -> SiteCountError | str:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - Dynamo wraps what a backend raises
        call()
    cause = raised.value.__cause__
    return next((e for e in (raised.value, cause) if isinstance(e, SiteCountError)), str(raised.value))


def test_the_right_number_is_no_error() -> None:
    run(model(False), 2, strict_sites=3)
    run(model(False, wrong=1), 2, strict_sites=2)
    run(lambda x: x + 1, strict_sites=0)


def test_the_message_lists_sites_and_near_misses_with_their_lines() -> None:
    text = str(error_of(lambda: run(model(False, wrong=1), strict_sites=3)))
    assert "2 attentions were rewritten, and strict_sites demands 3." in text
    assert "0: softmax(" in text
    assert "1: softmax(" in text
    assert "2: the softmax runs over axis 1" in text
    assert text.count("test_counting.py:") >= 3


def test_too_many_is_an_error_at_once() -> None:
    torch._dynamo.reset()
    call = attnfx.compile(model(True), inner="eager", strict_sites=1)
    assert "2 attentions were rewritten, and strict_sites demands 1" in str(error_of(lambda: call(X)))


def test_torch_compile_says_that_it_cannot_judge_a_broken_model() -> None:
    with pytest.warns(AttnfxWarning, match=r"not judged: the model has graph breaks.*attnfx.compile\(model, strict_sites=4\)"):
        run(model(True), 2, strict_sites=4)


@pytest.mark.parametrize("module", [False, True])
def test_the_graphs_of_a_broken_model_are_counted_together(module: bool) -> None:
    m: Any = model(True)
    for expected in (4, 2):  # the two layers that break are one graph; the one that does not is another
        torch._dynamo.reset()
        call = attnfx.compile(m if module else lambda x: m(x), inner="eager", strict_sites=expected)
        if expected == 4:
            error = error_of(lambda: call(X))  # noqa: B023
            assert isinstance(error, SiteCountError)
            assert (error.expected, error.found, len(error.sites)) == (4, 2, 2)
            assert "graph breaks" in str(error)
            continue
        for length in (5, 5, 6, 7):
            x = torch.randn(2, length, 4)
            torch.testing.assert_close(call(x), m(x))


def test_other_sizes_are_not_counted() -> None:
    torch._dynamo.reset()
    call = torch.compile(model(False), backend="attnfx", dynamic=False, options={"inner": "eager", "strict_sites": 3})
    for length in (5, 6, 7):
        call(torch.randn(2, length, 4))


def test_none_at_all_is_an_error_that_says_so() -> None:
    text = str(error_of(lambda: run(nn.Linear(4, 4), strict_sites=2)))
    assert "0 attentions were rewritten, and strict_sites demands 2" in text
    assert "none" in text
