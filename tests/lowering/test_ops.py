"""The operators: registered as torch wants them, equal to the site's meaning with all gradients, traceable with any sizes."""

from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from band_sites import banded
from band_sites import examples as band_examples
from lowering_sites import (
    HEADS,
    KEYS,
    QUERIES,
    SCALED,
    Example,
    H,
    I,
    J,
    alibi,
    causal,
    distance,
    examples,
    inputs,
    load,
    side,
    site,
    t5,
)  # fmt: skip
from torch import Tensor
from torch.library import opcheck

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite

S0, S1 = sympy.symbols("s0 s1", integer=True, positive=True)


def text_of(s: AttentionSite) -> str:
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan), plan
    return plan.to_json()


def attention(s: AttentionSite, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int] = ()) -> Tensor:
    out: Tensor = torch.ops.attnfx.attention(q, k, v, list(loads), list(sizes), text_of(s))
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("example", [*examples(), *band_examples()], ids=lambda e: e.name)
def test_output_and_gradients_are_the_reference(example: Example, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = inputs(example.site, dtype)
    loads = example.loads(dtype)
    got = attention(example.site, q, k, v, loads)
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in (q, k, v, *loads)]
    if example.site.fill > float("-inf") or example.name == "loaded mask":
        # eager's own rounding at the fill is what is wanted: compare in the same dtype
        wide = [t.detach().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in (q, k, v, *loads)]
    want = example.site.reference(*wide)
    grad = torch.randn_like(got)
    leaves = [(a, b) for a, b in zip((q, k, v, *loads), wide, strict=True) if a.requires_grad]
    gradients = torch.autograd.grad(got, [a for a, _ in leaves], grad)
    expected = torch.autograd.grad(want, [b for _, b in leaves], grad.to(want.dtype), materialize_grads=True)
    assert distance(got, want) < tolerance
    for (leaf, _), mine, theirs in zip(leaves, gradients, expected, strict=True):
        assert mine.dtype == leaf.dtype
        assert mine.shape == leaf.shape
        assert distance(mine, theirs) < 10 * tolerance


def test_float64_gradients_are_the_finite_differences() -> None:
    small = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 4, "keys": 5, "head_dim": 3, "value_dim": 2}
    s = site(SCALED + load(0, H, I, J), causal(1), side=(side(2, 4, 5, grad=True),), **small)
    q, k, v = inputs(s, torch.float64)
    bias, text = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), text_of(s)

    def both(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, ...] = torch.ops.attnfx.flash(q, k, v, [bias], [], None, text)
        return found[0], found[1]  # the LSE has a gradient too

    assert torch.autograd.gradcheck(both, (q, k, v, bias))


def test_a_row_bias_moves_only_the_lse() -> None:
    s = site(SCALED + load(0, I), side=(side(QUERIES, grad=True),))
    q, k, v = inputs(s, torch.float64)
    bias = torch.randn(QUERIES, dtype=torch.float64, requires_grad=True)
    lse = torch.ops.attnfx.flash(q, k, v, [bias], [], None, text_of(s))[1]
    (grad,) = torch.autograd.grad(lse.sum(), bias)
    torch.testing.assert_close(grad, torch.full_like(grad, 8.0))


CHECKED = {
    "causal": (site(keep=causal()), ()),
    "exact rows": (site(keep=causal(), fill=-1e4, empty_rows="fill"), ()),
    "bias": (site(SCALED + load(0, H, I, J), side=(side(HEADS, QUERIES, KEYS, grad=True),)), ((HEADS, QUERIES, KEYS),)),
    "t5": (site(t5(), side=(side(32, HEADS, grad=True),)), ((32, HEADS), (HEADS, QUERIES + KEYS - 1))),
    "dropout": (site(keep=causal(), dropout=0.3), ()),
}


@pytest.mark.parametrize("name", CHECKED)
def test_torch_accepts_the_operators(name: str) -> None:
    s, shapes = CHECKED[name]
    q, k, v = inputs(s, torch.float32)
    loads = [torch.randn(shape, requires_grad=True) for shape in shapes]
    seed = torch.tensor([1234]) if s.dropout else None
    arguments = (q, k, v, loads, [], seed, text_of(s))
    opcheck(torch.ops.attnfx.flash.default, arguments)
    results = torch.ops.attnfx.flash(*arguments)
    detached = [t.detach() for t in (q, k, v)]
    rest = (*[t.detach() for t in results], torch.randn_like(results[0]).detach(), None)
    opcheck(torch.ops.attnfx.flash_backward.default, (*detached, [t.detach() for t in loads], [], seed, text_of(s), *rest))


def test_fake_outputs_have_the_real_strides() -> None:
    s = site(keep=causal())
    q, k, v = inputs(s, torch.float32)
    real = torch.ops.attnfx.flash(q, k, v, [], [], None, text_of(s))[0]
    assert real.stride() == real.transpose(1, 2).contiguous().transpose(1, 2).stride()
    assert real.transpose(1, 2).reshape(2, QUERIES, -1).data_ptr() == real.data_ptr()


def test_one_graph_serves_all_sizes() -> None:
    s = site(t5(), causal(S1 - S0), queries=S0, keys=S1, side=(side(32, HEADS, grad=True),))
    text, table = text_of(s), torch.randn(32, HEADS, requires_grad=True)

    def model(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out: Tensor = torch.ops.attnfx.attention(q, k, v, [table], [q.shape[2], k.shape[2]], text)
        return out.transpose(1, 2).reshape(q.shape[0], -1, HEADS * 16).sin()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for queries, keys in ((37, 53), (20, 41), (64, 64)):
        q, k, v = inputs(s.replace(queries=sympy.Integer(queries), keys=sympy.Integer(keys)), torch.float32)
        leaves = [q, k, v, table]
        got, want = compiled(q, k, v, table), model(q, k, v, table)
        grad = torch.randn_like(want)
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


def test_dropout_in_a_compiled_graph_draws_anew() -> None:
    s = site(keep=causal(), dropout=0.5, batch=1, heads=2, key_heads=2)
    q, k, v = inputs(s, torch.float32)
    text = text_of(s)
    compiled = torch.compile(lambda q, k, v: torch.ops.attnfx.attention(q, k, v, [], [], text), backend="aot_eager")
    assert not torch.equal(compiled(q, k, v), compiled(q, k, v))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 2, None)])
def test_vmap(in_dims: tuple[Any, ...]) -> None:
    s = site(alibi(), causal(), side=(side(HEADS),))
    q, k, v = inputs(s, torch.float32)
    slopes, text = torch.randn(HEADS), text_of(s)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.attnfx.attention(q, k, v, [slopes], [], text)
        return out

    mapped = [t if d is None else torch.stack([t, t + 1, t * 2], d) for t, d in zip((q, k, v), in_dims, strict=True)]
    got = torch.vmap(one, in_dims)(*mapped)
    for n in range(3):
        torch.testing.assert_close(got[n], one(*(t if d is None else t.select(d, n) for t, d in zip(mapped, in_dims, strict=True))))


def test_second_derivatives_are_those_of_the_formula() -> None:
    s = site(alibi(), causal(), side=(side(HEADS),))
    slopes = torch.rand(HEADS)
    q, k, v = (t.double().requires_grad_() for t in inputs(s, torch.float32))
    got, want = (
        torch.autograd.grad(
            sum(g.square().sum() for g in torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)), (q, k, v)
        )
        for out in (attention(s.replace(dtype=torch.float64), q, k, v, (slopes,)), s.reference(q, k, v, slopes))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("left", [False, True])
def test_second_derivatives_of_a_second_product(left: bool) -> None:
    s = banded(keep=causal(16), left=left, shape=(1, 1, QUERIES + KEYS - 1))
    leaves = [t.double().detach().requires_grad_() for t in inputs(s, torch.float32)]
    leaves += [torch.randn([int(n) for n in t.shape], dtype=torch.float64, requires_grad=True) for t in s.side]
    got, want = (
        torch.autograd.grad(
            sum(g.square().sum() for g in torch.autograd.grad(out.square().sum(), leaves, create_graph=True)), leaves
        )
        for out in (attention(s, *leaves[:3], leaves[3:]), s.reference(*leaves))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_vmap_of_a_second_product() -> None:
    s = banded(left=True, shape=(1, 1, QUERIES + KEYS - 1))
    q, k, v = (t.detach() for t in inputs(s, torch.float32))
    rows, vectors = (torch.randn([int(n) for n in t.shape]) for t in s.side)
    queries = torch.stack([q, q + 1])
    got = torch.vmap(lambda q: torch.ops.attnfx.attention(q, k, v, [rows, vectors], [], text_of(s)))(queries)
    for n in range(2):
        torch.testing.assert_close(got[n], attention(s, queries[n], k, v, (rows, vectors)))


def test_a_second_derivative_with_dropout_is_an_error_that_says_so() -> None:
    s = site(dropout=0.5)
    q, k, v = inputs(s, torch.float32)
    (grad,) = torch.autograd.grad(attention(s, q, k, v, ()).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="not of one with dropout"):
        torch.autograd.grad(grad.sum(), k)


def test_vmap_folds_examples_into_the_batch() -> None:
    s = site(alibi(), causal(), side=(side(HEADS),))
    q, k, v = inputs(s, torch.float32)
    slopes, text = torch.randn(HEADS), text_of(s)

    def each(q: Tensor) -> Tensor:
        return torch.vmap(lambda q: torch.ops.attnfx.attention(q, k, v, [slopes], [], text))(q)

    graph = torch.fx.experimental.proxy_tensor.make_fx(each)(torch.stack([q, q + 1, q * 2]))
    assert sum(n.target is torch.ops.attnfx.flash.default for n in graph.graph.nodes) == 1


def test_a_gradient_that_was_not_planned_is_an_error() -> None:
    s = site(SCALED + load(0, H, I, J), side=(side(HEADS, QUERIES, KEYS),))
    q, k, v = inputs(s, torch.float32)
    bias = torch.randn(HEADS, QUERIES, KEYS, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        attention(s, q, k, v, (bias,)).sum().backward()


def test_wrong_numbers_of_arguments_are_errors() -> None:
    s = site(alibi(), causal(S1 - S0), queries=S0, keys=S1, side=(side(HEADS),))
    q, k, v = inputs(site(), torch.float32)
    with pytest.raises(ValueError, match="0 side tensors were given; the plan has 1"):
        attention(s, q, k, v, (), (QUERIES, KEYS))
    with pytest.raises(ValueError, match="1 sizes were given; the plan has the symbols s0, s1"):
        attention(s, q, k, v, (torch.randn(HEADS),), (QUERIES,))


def test_half_precision_tables_sum_their_gradient_in_float32() -> None:
    s = site(t5(), side=(side(32, HEADS, dtype=torch.bfloat16, grad=True),), dtype=torch.bfloat16, queries=200, keys=200)
    q, k, v = inputs(s, torch.bfloat16)
    table = torch.randn(32, HEADS, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, HEADS, 200, 16).bfloat16()
    (got,) = torch.autograd.grad(attention(s, q, k, v, (table,)), table, grad)
    wide = [t.detach().double() for t in (q, k, v)]
    exact = table.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(s.reference(*wide, exact), exact, grad.double())
    assert got.dtype == torch.bfloat16
    assert distance(got, want) < 2e-2
