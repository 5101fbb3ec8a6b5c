"""Sinks, factors of the probabilities and the LSE as an output: every tier against float64, and what surrounds the kernel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import sympy
import torch
from interpreted import beyond, check
from lowering_sites import BATCH, HEADS, KEYS, QUERIES, SCALED, B, Example, H, J, causal, distance, inputs, load, random, side, site
from sink_cases import LEARNED, errors, examples, interpreted, plan_text
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from attnfx import expr
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.portable import aten
from attnfx.site import AttentionSite

S0, S1 = sympy.symbols("s0 s1", integer=True, positive=True)
SINK = site(keep=causal(), sink=load(0, H), side=(LEARNED,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_blocks_are_the_reference(example: Example, dtype: torch.dtype, tolerance: float) -> None:
    assert beyond(errors(example, "portable", dtype), tolerance) == {}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [e.name for e in interpreted()])
def test_kernels_are_the_reference(name: str) -> None:
    check(Path(__file__).parent / "sink_cases.py", name, tolerance=3e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_kernels_on_a_gpu_are_the_reference(example: Example) -> None:
    assert beyond(errors(example, "flash", torch.float32, "cuda"), 3e-5) == {}


@pytest.mark.parametrize("way", ["fused", "textbook"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (70, 1), (131, 257), (5, 0)])
def test_odd_sizes(way: str, m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "textbook":
        monkeypatch.setattr(aten.Fused, "of", staticmethod(lambda problem: None))
    s = SINK.replace(queries=sympy.Integer(m), keys=sympy.Integer(n), weight=load(1, J) * load(2, B, H))
    s = s.replace(side=(LEARNED, side(max(n, 1)), side(BATCH, HEADS, grad=True)))

    def loads(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (*random(HEADS)(dtype), *random(max(n, 1), grad=False)(dtype), *random(BATCH, HEADS)(dtype))

    assert beyond(errors(Example("", s, loads), "portable", torch.float32), 1e-5) == {}


def test_a_row_without_keys_belongs_to_the_sink() -> None:
    s = SINK.replace(keep=causal(-16))
    q, k, v = inputs(s, torch.float32)
    sink = torch.randn(HEADS)
    out, lse = torch.ops.attnfx.attention_lse(q, k, v, [sink], [], plan_text(s, "portable"))
    assert not out[:, :, :16].any()
    torch.testing.assert_close(lse[:, :, :16], sink[:, None].expand(2, HEADS, 16))
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan)
    assert not plan.exact_rows  # such rows are 0 in any kernel, without a second look


@pytest.mark.parametrize(("empty", "expected"), [("nan", math.nan), ("zero", 0.0)])
def test_a_sink_of_minus_infinity_takes_nothing(empty: str, expected: float) -> None:
    s = SINK.replace(keep=causal(-16), empty_rows=empty)
    q, k, v = inputs(s, torch.float32)
    sink = torch.full((HEADS,), -math.inf)
    out, lse = torch.ops.attnfx.attention_lse(q, k, v, [sink], [], plan_text(s, "portable"))
    plain = s.replace(sink=None, empty_rows="zero", side=()).reference(q, k, v)
    torch.testing.assert_close(out[:, :, :16], torch.full_like(out[:, :, :16], expected), equal_nan=True)
    torch.testing.assert_close(out[:, :, 16:], plain[:, :, 16:])
    for mine, theirs in zip((out, lse), s.reference_lse(q, k, v, sink), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_rows_of_nan_stay_their_own() -> None:
    s = SINK.replace(weight=load(1, H), side=(LEARNED, side(HEADS)))
    q, k, v = (t.detach() for t in inputs(s, torch.float32))
    q[0, 1, 5], given = math.nan, [torch.randn(HEADS), torch.rand(HEADS)]
    got = torch.ops.attnfx.attention_lse(q, k, v, given, [], plan_text(s, "portable"))
    for mine, theirs in zip(got, s.reference_lse(q, k, v, *given), strict=True):
        assert mine.isnan().any()
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_half_precision() -> None:
    s = SINK.replace(
        dtype=torch.bfloat16, side=(side(HEADS, dtype=torch.bfloat16, grad=True),), sink=load(0, H, dtype=torch.bfloat16)
    )
    found = errors(Example("", s, random(HEADS)), "portable", torch.bfloat16)
    assert beyond(found, 2e-2) == {}
    q, k, v = inputs(s, torch.bfloat16)
    out, lse = torch.ops.attnfx.attention_lse(q, k, v, [torch.randn(HEADS).bfloat16()], [], plan_text(s, "portable"))
    assert (out.dtype, lse.dtype, tuple(lse.shape)) == (torch.bfloat16, torch.float32, (BATCH, HEADS, QUERIES))


def test_dropout_has_the_gradient_of_its_own_mask() -> None:
    small = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 4, "keys": 6, "head_dim": 3, "value_dim": 3}
    s = site(keep=causal(2), weight=load(0, J), dropout=0.4, side=(side(6),), **small)
    q, k, v = inputs(s, torch.float64)
    gate, seed, text = torch.rand(6, dtype=torch.float64), torch.tensor([77]), plan_text(s, "portable")

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.attnfx.flash(q, k, v, [gate], [], seed, text)
        return out, lse

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_the_gradient_of_the_lse_alone() -> None:
    s = site(keep=causal())
    q, k, v = inputs(s, torch.float64)
    text = plan_text(s, "portable")
    got = torch.autograd.grad(torch.ops.attnfx.attention_lse(q, k, v, [], [], text)[1].sum(), (q, k, v))
    want = torch.autograd.grad(s.reference_lse(q, k, v)[1].sum(), (q, k, v), materialize_grads=True)
    assert all(distance(a, b) < 1e-11 for a, b in zip(got, want, strict=True))


def test_attention_without_them_is_one_operator() -> None:
    s = site(keep=causal(), requires_grad=False)
    q, k, v = (t.detach() for t in inputs(s, torch.float32))
    graph = make_fx(lambda q, k, v: torch.ops.attnfx.attention(q, k, v, [], [], plan_text(s, "portable")))(q, k, v).graph
    calls = [str(n.target) for n in graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
    assert calls == ["attnfx.flash.default"]


def test_one_graph_serves_all_sizes() -> None:
    s = SINK.replace(queries=S0, keys=S1, keep=causal(S1 - S0), sink=load(0, H) + expr.cast(expr.Int(S1), torch.float32) * 0.01)
    text, sink = plan_text(s, "portable"), torch.randn(HEADS, requires_grad=True)

    def model(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.attnfx.attention_lse(q, k, v, [sink], [q.shape[2], k.shape[2]], text)
        return out.sin(), lse * 2

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for queries, keys in ((37, 53), (20, 41)):
        q, k, v = inputs(s.replace(queries=sympy.Integer(queries), keys=sympy.Integer(keys)), torch.float32)
        got, want = compiled(q, k, v, sink), model(q, k, v, sink)
        torch.testing.assert_close(got, want)
        leaves = (q, k, v, sink)
        mine, theirs = (torch.autograd.grad(r[0].sum() + r[1].sum(), leaves) for r in (got, want))
        torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


def test_vmap() -> None:
    q, k, v = inputs(SINK, torch.float32)
    sink, text = torch.randn(HEADS), plan_text(SINK, "portable")
    two = torch.stack([q, q * 2])
    out, lse = torch.vmap(lambda q: torch.ops.attnfx.attention_lse(q, k, v, [sink], [], text))(two)
    for n in range(2):
        want = torch.ops.attnfx.attention_lse(two[n], k, v, [sink], [], text)
        torch.testing.assert_close((out[n], lse[n]), (want[0], want[1]))


GATE = load(0, H, J)


@pytest.mark.parametrize(
    ("s", "reason"),
    [
        (site(sink=load(0, J), side=(side(KEYS),)), "depends on the key or the score"),
        (site(sink=SCALED), "depends on the key or the score"),
        (site(weight=expr.call("sigmoid", SCALED)), "factor of the probabilities depends on the scores"),
        (site(weight=GATE, side=(side(HEADS, KEYS, grad=True),)), "changes with the key needs a gradient for side tensor 0"),
        (site(weight=1.0 - GATE, side=(side(HEADS, KEYS, grad=True),)), "changes with the key needs a gradient for side tensor 0"),
    ],
)
def test_what_has_no_lowering_is_refused(s: AttentionSite, reason: str) -> None:
    found = make_plan(s, "flash")
    assert isinstance(found, tuple)
    assert any(reason in sentence for sentence in found)


def test_a_weight_is_split_by_what_the_key_changes() -> None:
    s = site(weight=(GATE * load(1, B)) * (load(2, H) * 0.5), side=(side(HEADS, KEYS), side(BATCH), side(HEADS, grad=True)))
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan)
    assert plan.weight == GATE
    assert plan.outer == load(1, B) * load(2, H) * 0.5
    assert plan.used_slots == (0,)
    assert KernelPlan.from_json(plan.to_json()) == plan


def test_an_index_that_may_leave_its_tensor_is_clamped() -> None:
    s = site(sink=load(0, expr.index("i") + 30), weight=load(0, J - 9), side=(side(KEYS),))
    found = errors(Example("", s, random(KEYS, grad=False)), "portable", torch.float64)
    assert beyond(found, 1e-11) == {}
