"""Attention without a softmax over keys: what each spelling is described as, that the description computes it, and look-alikes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from graphs import compiled, dynamo_graph
from linear_lookalikes import LOOKALIKES
from linear_spellings import SPELLINGS, Linear, elu1, t
from torch import Tensor, fx

from attnfx.decide import decide
from attnfx.errors import Objection
from attnfx.graphs.capture import capture
from attnfx.graphs.mirror import Mirror
from attnfx.lowering.plan import make_plan
from attnfx.patterns import recognise, recognise_linear
from attnfx.patterns.axes import Operand
from attnfx.patterns.linear_site import LinearMatch
from attnfx.policy import Policy, Rule
from attnfx.site import Origin
from attnfx.sites.serialize import FormatError, Reader, Writer, site_from_data, site_to_data
from attnfx.variants.sliding_window import SlidingWindow


def found(function: Any, *args: Any, dynamic: bool | None = None) -> tuple[Mirror, fx.GraphModule, list[LinearMatch], list[Any]]:
    graph = dynamo_graph(function, *args, dynamic=dynamic)
    mirror = capture(graph)
    linears, missed = recognise_linear(mirror, *recognise(mirror))
    return mirror, graph, linears, missed


def values(mirror: Mirror, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """What every node of the mirror computes for real inputs."""
    owner = mirror.graph.owning_module
    run = fx.Interpreter(owner if isinstance(owner, fx.GraphModule) else fx.GraphModule(torch.nn.Module(), mirror.graph))
    run.garbage_collect_values = False
    run.run(*inputs)
    return run.env


def canonical(value: Tensor, operand: Operand, match: LinearMatch, *, key: bool, last: sympy.Symbol, row: sympy.Symbol) -> Tensor:
    """A tensor with its axes in the canonical order (batch, heads, tokens, width)."""
    layout, size = match.layout, {s: int(n) for s, n in match.extents.sizes.items()}
    groups = [layout.batch, layout.heads if key else (*layout.heads, *layout.groups), (row,), (last,)]
    atoms = [s for axis in operand.axes for s in axis]
    x = value.reshape([size[s] for s in atoms])
    order = [s for group in groups for s in group]
    x = x.permute([atoms.index(s) for s in order if s in atoms])
    for place, s in enumerate(order):
        if s not in atoms:
            x = x.unsqueeze(place).expand(*x.shape[:place], size[s], *x.shape[place:])
    shape = [1, 1, 1, 1]
    for k, group in enumerate(groups):
        for s in group:
            shape[k] *= size[s]
    return x.reshape(shape)


def meant(mirror: Mirror, match: LinearMatch, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """What the site's reference computes from the operands, and what the graph computes, both canonical."""
    at, layout = values(mirror, inputs), match.layout
    q = canonical(at[match.query.node], match.query, match, key=False, last=layout.d, row=layout.i)
    k = canonical(at[match.key.node], match.key, match, key=True, last=layout.d, row=layout.j)
    v = canonical(at[match.value.node], match.value, match, key=True, last=layout.dv, row=layout.j)
    got = match.site.reference(q, k, v, *(at[n] for n in match.loads))
    groups = (layout.batch, (*layout.heads, *layout.groups), (layout.i,), (layout.dv,))
    known = [s for group in groups for s in group if s in set().union(*match.result.axes)]
    atoms = [s for axis in match.result.axes for s in axis]
    want = at[match.output].reshape([int(match.extents.sizes[s]) for s in atoms])
    return got, want.permute([atoms.index(s) for s in known]).reshape(got.shape)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_described_and_the_description_computes_it(name: str) -> None:
    spelling: Linear = SPELLINGS[name]
    args = spelling.arguments()
    mirror, graph, matches, missed = found(spelling.function, *args)
    assert [str(m.site).partition("  [")[0] for m in matches] == [spelling.formula]
    assert not missed, [m.reason for m in missed]
    inputs = _inputs(graph, spelling.function, args)
    got, want = meant(mirror, matches[0], inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    site, writer = matches[0].site, Writer()
    data = json.loads(json.dumps(site_to_data(site, writer)))
    back = site_from_data(data, Reader(json.loads(json.dumps(writer.nodes)), len(site.side)))
    assert (back, str(back)) == (site, str(site))
    assert site.replace(origin=Origin("a", "b", "c")) == site


def _inputs(graph: fx.GraphModule, function: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments in the order of the graph's placeholders, which Dynamo names after the parameters of the function."""
    named = {f"l_{name}_": a for name, a in zip(inspect.signature(function).parameters, args, strict=True)}
    return [named[p.name.lower()] for p in graph.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("name", ["torchscale RetNet", "LoFTR with masks", "EfficientViT", "ddpm", "gated head"])
def test_nothing_changes_and_the_report_says_kept(name: str) -> None:
    spelling = SPELLINGS[name]
    args = spelling.arguments()
    got, report = compiled(spelling.function, *args)
    torch.testing.assert_close(got, spelling.function(*args), rtol=0, atol=0)
    assert [(s.decision, s.pattern, s.exact, s.kernel) for s in report.sites] == [("kept", "linear", True, None)]
    assert ": left as the model computes it" in report.sites[0].reason
    assert report.sites[0].source
    assert not report.missed


@pytest.mark.parametrize("name", LOOKALIKES)
def test_look_alikes_are_refused(name: str) -> None:
    function, shapes = LOOKALIKES[name]
    if isinstance(function, torch.nn.Module):
        function = function.double()
    torch.manual_seed(0)
    *_, matches, _ = found(function, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    assert not matches, [str(m.site) for m in matches]


def test_the_linear_and_the_quadratic_form_are_one_site() -> None:
    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = elu1(q) @ t(elu1(k))
        return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = elu1(q), elu1(k)
        return (q @ (t(k) @ v)) / (torch.einsum("bhid,bhd->bhi", q, k.sum(2)) + 1e-6)[..., None]

    args = SPELLINGS["plain"].arguments()
    first, second = (found(f, *args)[2][0].site for f in (quadratic, linear))
    assert first == second


def test_sizes_known_only_at_run_time() -> None:
    def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.relu(q @ t(k)) / k.size(2) @ v

    q, k, v = SPELLINGS["plain"].arguments()
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    *_, matches, _ = found(mean, q, k, v)
    assert len(matches) == 1
    site = matches[0].site
    assert site.keys.is_Symbol
    assert str(site).startswith(f"Σ_j w v, w = max(q·k, 0)/{site.keys}  [")
    want = torch.relu(q @ t(k)) / 7 @ v
    torch.testing.assert_close(site.reference(q, k, v, sizes=(7,)), want)


def test_gradients_of_a_divisor_that_is_held_constant() -> None:
    def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ t(k)
        return (w / w.detach().abs().sum(-1, keepdim=True).clamp(min=1)) @ v

    args = [x.requires_grad_() for x in SPELLINGS["plain"].arguments()]
    *_, matches, _ = found(retention, *args)
    assert [m.site.divisor_detached for m in matches] == [True]
    assert matches[0].site.requires_grad
    assert str(matches[0].site).startswith("Σ_j w v / max(l, 1), l = Σ_j |w| held constant, w = q·k  [")


def test_a_rule_that_names_a_linear_attention_raises_and_a_wish_leaves_it() -> None:
    args = [x.float() for x in SPELLINGS["plain"].arguments()]
    function = SPELLINGS["plain"].function
    got, report = compiled(function, *args, policy=[Rule("*", SlidingWindow(window=3))])
    torch.testing.assert_close(got, function(*args), rtol=0, atol=0)
    assert "SlidingWindow changes softmax attention" in report.sites[0].reason
    site = report.sites[0].site.replace(origin=Origin(module="layers.0"))
    with pytest.raises(Objection, match="SlidingWindow changes softmax attention"):
        decide(site, Policy([Rule("layers.*", SlidingWindow(window=3))]))


def test_operands_written_before_the_result_is_computed_are_not_described() -> None:
    def overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q * 1.0, k * 1.0
        state = t(k) @ v
        k.zero_()
        return q @ state

    args = SPELLINGS["plain"].arguments()
    *_, matches, _ = found(overwritten, *args)
    assert not matches


def test_a_normaliser_of_other_weights_is_none() -> None:
    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = elu1(q), elu1(k)
        return (q @ (t(k) @ v)) / torch.einsum("bhid,bhd->bhi", q, (2 * k + 1).sum(2))[..., None]

    args = SPELLINGS["plain"].arguments()
    *_, matches, _ = found(other, *args)
    assert [m.site.normaliser for m in matches] == ["none"]


def test_no_plan_is_made_of_it() -> None:
    *_, matches, _ = found(SPELLINGS["plain"].function, *SPELLINGS["plain"].arguments())
    made = make_plan(matches[0].site, "portable")
    assert isinstance(made, tuple)
    assert "a plan computes a softmax over keys" in made[0]


@pytest.mark.parametrize("bad", ["mean", None, 3])
def test_only_known_normalisers_are_read(bad: Any) -> None:
    *_, matches, _ = found(SPELLINGS["plain"].function, *SPELLINGS["plain"].arguments())
    writer = Writer()
    data = site_to_data(matches[0].site, writer)
    data["linear"][0] = bad
    with pytest.raises(FormatError, match="linear is"):
        site_from_data(data, Reader(writer.nodes, 0))


def test_a_product_whose_operand_was_changed_in_place_is_no_error() -> None:
    def scaled(q: Tensor, k: Tensor) -> Tensor:
        q = q.clone()
        return torch.einsum("rihd,rjhd->hij", q.mul_(0.2), k)

    q, k = torch.randn(2, 2, 5, 3, 4)
    got, report = compiled(scaled, q, k)
    assert not report.sites
    torch.testing.assert_close(got, scaled(q, k))
