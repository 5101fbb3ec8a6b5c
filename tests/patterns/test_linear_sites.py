"""Models of linear attention run in its kernels, unmodified: values and gradients beside float64 and eager."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import compiled
from interpreted import rows
from linear_models import LOWERED, WIDTH, GroupedLinear, Heads, LinearTransformer, ReluViT, RetNet, TorchscaleRetNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnfx
from attnfx.lowering.linear.plan import LinearPlan

#: More than one chunk of tokens.
LENGTH = 150


def tokens(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def made(kind: type[Heads], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def gradients(model: nn.Module, out: Tensor, x: Tensor) -> list[Tensor]:
    """Of the model's input and parameters, for the same gradient of any result of this shape."""
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return list(torch.autograd.grad(out, [x, *model.parameters()], g))


def errors(kind: type[Heads], dtype: torch.dtype, **options: Any) -> tuple[list[float], list[float], Any]:
    """How far ours and eager's result and gradients are from float64, in relative L2 norms, and the report."""
    model, x = made(kind, dtype), tokens(dtype=dtype).requires_grad_()
    exact, wide = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    got, report = compiled(model, x, **options)
    outs = [got, model(x), exact(wide)]
    ours, eager, want = (
        [out, *gradients(m, out, given)] for m, out, given in zip((model, model, exact), outs, (x, x, wide), strict=True)
    )
    far = [[float((a.double() - b).norm() / b.norm()) for a, b in zip(found, want, strict=True)] for found in (ours, eager)]
    return far[0], far[1], report


@pytest.mark.parametrize("name", LOWERED)
def test_a_model_is_rewritten_and_is_as_near_to_float64_as_eager(name: str) -> None:
    ours, eager, report = errors(LOWERED[name], torch.float32)
    assert [(s.decision, s.exact, s.variant, s.pattern) for s in report.sites] == [("linear", True, None, "linear")]
    assert "time and memory grow with the length" in report.sites[0].reason
    assert not report.missed
    # the bias of the keys has a gradient that mostly cancels
    assert all(a < 2 * b + 2e-6 for a, b in zip(ours, eager, strict=True)), (ours, eager)


@pytest.mark.parametrize("name", ["LinearTransformer", "RetNet", "ReluViT", "TorchscaleRetNet", "GroupedLinear"])
def test_in_half_precision_no_further_from_float64_than_eager(name: str) -> None:
    ours, eager, report = errors(LOWERED[name], torch.bfloat16)
    assert [s.decision for s in report.sites] == ["linear"]
    assert all(a < 1.5 * b + 2e-3 for a, b in zip(ours, eager, strict=True)), (ours, eager)


def test_a_length_that_changes_is_one_graph() -> None:
    model, reports = made(RetNet), list[attnfx.Report]()
    listening = attnfx.backend.listeners.set((reports.append,))
    torch._dynamo.reset()
    try:
        run = torch.compile(model, backend="attnfx", options={"inner": "aot_eager", "strict": True})
        for length in (150, 131):
            x = tokens(length).requires_grad_()
            torch._dynamo.maybe_mark_dynamic(x, 1)
            got, want = run(x), model(x)
            for a, b in zip((got, *gradients(model, got, x)), (want, *gradients(model, want, x)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    finally:
        attnfx.backend.listeners.reset(listening)
    assert [(s.decision, s.site.keys.is_Symbol) for r in reports for s in r.sites] == [("linear", True)]


def test_inside_of_vmap_and_of_checkpointing() -> None:
    model = made(RetNet).requires_grad_(False)
    x = torch.stack([tokens(), -tokens()])
    for function, given in ((torch.func.vmap(model), x), (lambda y: checkpoint(model, y, use_reentrant=False), x[0])):
        got, report = compiled(function, given)
        assert [s.decision for s in report.sites] == ["linear"]
        torch.testing.assert_close(got, function(given), rtol=1e-4, atol=1e-4)


def test_factors_out_of_the_range_of_float16_are_not_lost() -> None:
    q, k, v = (torch.rand(1, 1, 400, 4, generator=torch.Generator().manual_seed(n)) * 8 for n in range(3))

    def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 2.0**-20).tril() @ v

    got, report = compiled(mean, q.half(), k.half(), v.half())
    want = mean(q.half().double(), k.half().double(), v.half().double())
    assert [s.decision for s in report.sites] == ["linear"]
    assert float((got.double() - want).norm() / want.norm()) < 2e-3


def test_nothing_of_all_pairs_is_left() -> None:
    _, report = compiled(made(ReluViT), tokens())
    assert "linear_site" in report.after
    assert "matmul(" not in report.after


def test_a_decay_that_is_no_decay_any_more_compiles_anew() -> None:
    model = made(TorchscaleRetNet)
    x = tokens(100)
    torch._dynamo.reset()
    run = torch.compile(model, backend="attnfx", options={"inner": "eager", "strict": True})
    for scale in (1.0, 3.0, -1.0):  # the last one grows: what is masked is huge, and no zero
        model.decay.copy_(scale * torch.log(1 - 2 ** (-5 - torch.arange(2, dtype=torch.float))))
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_verification_measures_a_site() -> None:
    _, report = compiled(made(RetNet), tokens(), verify=True)
    measured = report.sites[0].measured
    assert measured is not None
    assert measured.bound is not None
    assert 0 <= measured.error < 1e-6


def test_heads_that_are_repeated_before_they_are_mapped() -> None:
    _, report = compiled(made(GroupedLinear), tokens())
    site = report.sites[0].site
    assert site.heads == 2 * site.key_heads


@pytest.mark.parametrize(
    ("kind", "length", "decision"), [(ReluViT, 20, "kept"), (LinearTransformer, 20, "linear"), (LinearTransformer, 9, "kept")]
)
def test_few_tokens_are_left_to_pairs_and_very_few_to_running_sums(kind: type[Heads], length: int, decision: str) -> None:
    _, report = compiled(made(kind), tokens(length))
    (site,) = report.sites
    assert site.decision == decision
    few = f"{length} queries and {length} keys cost less than states of 8 x 8 numbers"
    assert (few in site.reason) == (decision == "kept")


def test_a_plan_is_text_and_back() -> None:
    _, report = compiled(made(TorchscaleRetNet), tokens())
    call = report.after[report.after.index("linear_site") :]
    text = "{" + call.partition("'{")[2].partition("}'")[0] + "}"
    plan = LinearPlan.from_json(text)
    assert plan.to_json() == text
    assert (plan.causal, plan.divisor, plan.eps) == (True, "max_abs held", 1.0)
    assert plan.decay is not None
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="0 side tensors and 0 sizes were given; the plan has 2 and 0"):
        torch.ops.attnfx.linear_site(q, q, q, [], [], text)


@pytest.mark.interpreter
def test_kernels_run_models() -> None:
    (found,) = rows(Path(__file__).parent / "linear_sites_script.py")
    for name, (decision, far) in found.items():
        assert decision == ["linear"], name
        assert max(far) < 2e-5, (name, far)
