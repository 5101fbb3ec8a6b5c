"""The backend as a user meets it: options, errors, warnings, policies, and models that hold nothing to rewrite."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor, nn
from torch._dynamo.utils import counters

import attnfx
from attnfx import backend
from attnfx.errors import AttnfxWarning, Objection, PolicyError, UnknownOption
from attnfx.options import Options
from attnfx.policy import Policy, Rule
from attnfx.variants import SlidingWindow


class Block(nn.Module):
    """Causal self-attention over x (B, S, 8) with two heads."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(8, 24), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


X = torch.linspace(-1, 1, 2 * 9 * 8).view(2, 9, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": None}, r'no option "polcy".*Did you mean "policy"'),
        ({"inner": "inducter"}, r'"inner" is .inducter.; it must be one of .*"inductor".*Did you mean'),
        ({"strict": "yes"}, r'"strict" is .yes.; it must be True or False\.'),
        ({"verify": "last"}, r'"verify" is .last.; it must be True or False, or "first"'),
        ({"strict_sites": -1}, r'"strict_sites" is -1; it must be a number of attentions'),
        ({"strict_sites": True}, r'"strict_sites" is True; it must be a number of attentions'),
        ({"mode": "fast"}, r'"mode" is .fast.; it must be one of "default"'),
        ({"buffers": "guess"}, r'"buffers" is .guess.; it must be one of "read"'),
        ({"tune": "max"}, r'"tune" is .max.; it must be one of "off"'),
        ({"inner": 3}, r'"inner" is 3; it must be the name of a backend or a callable'),
    ],
)
def test_an_unknown_option_lists_the_known_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        Options.parse(None, options)
    with pytest.raises(Exception, match=message):
        torch.compile(model(), backend=backend.attnfx, options=options)(X)


def test_a_model_without_attention_compiles_and_says_so() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    got, report = compiled(plain, X)
    assert_same(got, plain(X))
    assert report.sites == ()
    assert "no attention" in str(report)


def test_a_policy_changes_what_runs() -> None:
    m = model()
    policy = Policy([Rule("1", SlidingWindow(window=3))])
    got, report = compiled(m, X, policy=policy)
    assert [s.exact for s in report.sites] == [True, False]
    assert report.sites[1].variant == SlidingWindow(window=3)
    first = m[0](X)
    q, k, v = m[1].qkv(first).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    i = torch.arange(9)
    keep = (i <= i[:, None]) & (i[:, None] - i < 3)
    want = first + F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2)
    assert_same(got, want)
    assert (got - m(X)).abs().max() > 1e-3


def test_an_order_that_cannot_be_followed_is_an_error_with_the_objection() -> None:
    class Cross(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x[:, :4], x, x)

    with pytest.raises(Exception, match="SlidingWindow cannot serve") as raised:
        compiled(nn.Sequential(Cross()), X, policy=[Rule("0", SlidingWindow(window=3))])
    assert isinstance(raised.value.__cause__ or raised.value, Objection) or "SlidingWindow" in str(raised.value)
    got, report = compiled(nn.Sequential(Cross()), X, policy=[Rule("*", SlidingWindow(window=3))])
    assert report.sites[0].exact
    assert "objects" in report.sites[0].reason
    assert_same(got, Cross()(X))


def test_a_rule_that_matches_nothing_warns_and_lists_what_there_is() -> None:
    with pytest.warns(AttnfxWarning, match=r'"layers\.9".*matches no attention.*it has: 0, 1'):
        compiled(model(), X, policy=[Rule("layers.9", SlidingWindow(window=3))])


def test_a_bad_glob_is_refused_at_once() -> None:
    with pytest.raises(PolicyError, match=r"\["):
        attnfx.compile(model(), policy=[Rule("layers.[0-3", SlidingWindow(window=3))])


def test_an_internal_error_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(backend, "decide", broken)
    m = model()
    with pytest.warns(AttnfxWarning, match="left a graph as it was: ZeroDivisionError: a bug of ours"):
        got, report = compiled(m, X, strict=False)
    assert_same(got, m(X))
    assert report.sites == ()
    with pytest.raises(Exception, match="a bug of ours"):
        compiled(m, X, strict=True)


def test_one_broken_splice_leaves_the_other_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfx.graphs.rewrite import Splicer

    whole, calls = Splicer.restored, []

    def sometimes(self: Splicer, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise LookupError("not this one")
        return whole(self, *args)

    monkeypatch.setattr(Splicer, "restored", sometimes)
    m = model()
    with pytest.warns(AttnfxWarning, match="left 0 as it was"):
        got, report = compiled(m, X, strict=False)
    assert_same(got, m(X))
    assert [s.module for s in report.sites] == ["1"]


def test_verify_compares_with_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnfxWarning)
        compiled(model(), X, verify=True)
    from attnfx import measure

    monkeypatch.setattr(measure, "TOLERANCE", -1.0)
    with pytest.warns(AttnfxWarning, match="differs from the original's by"):
        compiled(model(), X + 0.123, verify=True, strict=False)


def test_verify_in_numbers() -> None:
    exact = attnfx.verify(model(), X)
    assert exact.worst < 1e-6
    assert len(exact.report.sites) == 2
    windowed = attnfx.verify(model(), X, policy=[Rule("*", SlidingWindow(window=2))])
    assert windowed.worst > 1e-3


def test_recompiles_are_those_of_dynamo_alone() -> None:
    def frames(**compile_with: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        f = torch.compile(model(), dynamic=True, **compile_with)
        for s in range(4, 14):
            f(torch.randn(2, s, 8))
        return int(counters["stats"]["unique_graphs"])

    assert frames(backend=backend.attnfx, options={"inner": "eager", "strict": True}) == frames(backend="eager")


def test_fullgraph_training_and_grad_modes() -> None:
    m = model()
    f = torch.compile(m, backend=backend.attnfx, fullgraph=True, options={"inner": "aot_eager", "strict": True})
    f(X).square().sum().backward()
    got = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    m.zero_grad()
    m(X).square().sum().backward()
    assert_same(got, [p.grad for p in m.parameters() if p.grad is not None], 1e-5)
    with torch.no_grad():
        assert_same(f(X), m(X))


def test_inductor_is_the_default() -> None:
    m = model()
    f = attnfx.compile(m)
    assert_same(f(X), m(X))
