"""torch.func inside and around a compiled function: never an error where eager works, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled, dynamo_graph
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from attnfx.backend import rewrite
from attnfx.options import Options


def biased(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[-2])
    return ((x @ x.mT) + (i[:, None] - i) * 0.1).softmax(-1) @ x


def total(x: Tensor) -> Tensor:
    return biased(x).square().sum()


X = torch.linspace(-1, 1, 60).view(3, 5, 4)
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda x: grad(total)(x),
    "vjp": lambda x: vjp(biased, x)[1](x.cos()),
    "jvp": lambda x: jvp(biased, (x,), (x.cos(),)),
    "jacrev": lambda x: jacrev(biased)(x[0]),
    "hessian": lambda x: hessian(total)(x[0]),
    "grad of each example": lambda x: vmap(grad(total))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_inside_is_left_to_torch_and_reported(name: str) -> None:
    function = TRANSFORMS[name]
    got, report = compiled(function, X)
    assert_same(got, function(X), 1e-5)
    assert report.sites == ()
    assert any("torch.func" in m.reason and "test_levels.py" in m.source for m in report.missed)
    got, report = compiled(biased, X)  # functorch's stack is as it was
    assert len(report.sites) == 1


@pytest.mark.parametrize("name", ["grad", "jvp", "grad of each example"])
def test_a_transform_around_the_compiled_function(name: str) -> None:
    torch._dynamo.reset()
    call = torch.compile(biased, backend="attnfx", options={"inner": "eager"})
    around = {"grad": lambda f: grad(lambda x: f(x).square().sum())(X), "jvp": lambda f: jvp(f, (X,), (X.cos(),)),
              "grad of each example": lambda f: vmap(grad(lambda x: f(x).square().sum()))(X)}[name]  # fmt: skip
    assert_same(around(call), around(biased), 1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_vmap_inside_is_rewritten(inner: str) -> None:
    def each(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        plain = vmap(lambda y: F.scaled_dot_product_attention(y, y, y), in_dims=1, out_dims=1)(x)
        own_bias = vmap(lambda y, b: (y @ y.mT + b).softmax(-1) @ y)(x, bias)
        return plain, own_bias, vmap(vmap(biased))(x)

    x, bias = torch.randn(3, 2, 5, 4), torch.randn(3, 5, 5)
    got, report = compiled(each, x, bias, inner=inner)
    assert len(report.sites) == 3
    assert_same(got, each(x, bias))


def test_dropout_under_vmap_is_left_alone() -> None:
    def each(x: Tensor) -> Tensor:
        return vmap(lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5), randomness="same")(x)

    got, report = compiled(each, torch.ones(3, 2, 5, 4))
    assert_same(got[0], got[1])
    assert "vmap" in report.missed[0].reason


def test_forward_mode() -> None:
    def dual(function: Callable[..., Any]) -> Any:
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(X, X.cos()))))

    torch._dynamo.reset()
    call = torch.compile(biased, backend="attnfx", options={"inner": "aot_eager", "strict": True})
    assert_same(dual(call), dual(biased))
    assert_same(call(X), biased(X))


def test_derivatives_of_derivatives() -> None:
    """With an inner backend that keeps autograd's own graph; torch's AOTAutograd refuses them for every model."""
    bias = torch.randn(5, 5).double()

    def attend(x: Tensor, bias: Tensor) -> Tensor:
        i = torch.arange(x.shape[-2])
        return (x @ x.mT * 0.5 + bias).masked_fill(i[:, None] + 2 < i, float("-inf")).softmax(-1) @ x

    def derivatives(function: Callable[..., Tensor]) -> Any:
        x, b = X.double().requires_grad_(), bias.clone().requires_grad_()
        first = torch.autograd.grad(function(x, b).square().sum(), [x, b], create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), [x, b], create_graph=True)
        return first, second, torch.autograd.grad(second[0].square().sum(), [x, b])

    torch._dynamo.reset()
    call = torch.compile(attend, backend="attnfx", options={"inner": "eager", "strict": True, "strict_sites": 1})
    for got, want in zip(pytree.tree_leaves(derivatives(call)), pytree.tree_leaves(derivatives(attend)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_a_failure_while_looking_leaves_no_level_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = dynamo_graph(lambda x: vmap(biased)(x), X)
    from attnfx.graphs.capture import Tracer

    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    whole, seen = Tracer.value_of, []

    def fails(self: Tracer, n: torch.fx.Node) -> Any:
        result = whole(self, n)
        if torch._C._functorch.get_dynamic_layer_stack_depth() > depth or "add_batch_dim" in n.name:
            seen.append(n)
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Tracer, "value_of", fails)
    with pytest.raises(KeyboardInterrupt):
        rewrite(gm, Options())
    assert seen
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == depth
