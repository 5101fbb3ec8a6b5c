"""Never silently wrong: the soundness cases through the backend, compared with eager in outputs, NaN, gradients and
written inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import soundness_layouts  # noqa: F401 - registers its cases
import soundness_numbers  # noqa: F401 - registers its cases
import torch
import torch._dynamo.testing
from graphs import torch_divides_by_no_heads
from soundness_kit import CASES, FORWARD_ONLY, INF, SDPA, A, T, later, scores
from torch import Tensor, nn

from attnfx.backend import attnfx, listeners
from attnfx.report import Report

# Running them ------------------------------------------------------------------------------------------------------------


def outcome(f: Callable[..., Any], args: tuple[Any, ...], grad: bool) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Outputs, gradients and what became of the inputs."""
    given = [a.detach().clone().requires_grad_(grad and a.is_floating_point()) if isinstance(a, Tensor) else a for a in args]
    torch.manual_seed(0)
    outputs = [o for o in torch.utils._pytree.tree_leaves(f(*given)) if isinstance(o, Tensor)]
    inputs = [a for a in given if isinstance(a, Tensor)]
    wanted = [a for a in inputs if a.requires_grad]
    differentiable = [o for o in outputs if o.requires_grad]
    if not (wanted and differentiable):
        return outputs, [], inputs
    weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).reshape(o.shape) for o in differentiable]
    loss = sum(((o.double() * w).sum() for o, w in zip(differentiable, weights, strict=True)), torch.zeros(()))
    return outputs, list(torch.autograd.grad(loss, wanted, allow_unused=True)), inputs


def agree(ours: Tensor | None, eager: Tensor | None, tolerance: float, what: str) -> None:
    assert (ours is None) == (eager is None), f"{what}: eager has {'no' if eager is None else 'a'} gradient"
    if ours is None or eager is None:
        return
    assert (ours.shape, ours.dtype, ours.requires_grad) == (eager.shape, eager.dtype, eager.requires_grad), what
    scale = float(eager.detach().double().nan_to_num(0, 0, 0).abs().max()) if eager.numel() else 0.0
    torch.testing.assert_close(
        ours.detach(), eager.detach(), rtol=0, atol=tolerance * (1 + scale), equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def compiled(f: Callable[..., Any], reports: list[Report], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    listeners.set((reports.append,))
    return torch.compile(f, backend=attnfx, options={"inner": "eager", "strict": True}, **options)


@pytest.fixture(autouse=True)
def _own_listeners() -> Any:
    before = listeners.get()
    yield
    listeners.set(before)


def tolerance_of(args: tuple[Any, ...]) -> float:
    sizes = [a.dtype.itemsize for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    return {2: 3e-2, 4: 2e-5, 8: 1e-11}[min(sizes)]


@pytest.mark.parametrize("name", CASES)
def test_same_as_eager(name: str) -> None:
    if name.startswith("H=0") and torch_divides_by_no_heads():
        pytest.skip("torch's own attention for CPUs ends the process here")
    sites, f, args = CASES[name]
    grad, reports = name not in FORWARD_ONLY, list[Report]()
    eager = outcome(f, args, grad)
    ours = outcome(compiled(f, reports), args, grad)
    for part, mine, theirs in zip(("output", "gradient", "input"), ours, eager, strict=True):
        assert len(mine) == len(theirs)
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            agree(a, b, tolerance_of(args) * (5 if part == "gradient" else 1), f"{part} {k}")
    if sites is not None:
        assert sum(s.rewritten for r in reports for s in r.sites) == sites, [m.reason for r in reports for m in r.missed]


_x, _causal, _pad = T(2, 6, 8), later(6, 6), A(6)[None] >= torch.tensor([[6], [4]])
MASKS = {
    "none": {}, "causal": {"mask": _causal}, "float": {"mask": torch.zeros(6, 6).masked_fill(_causal, -INF)},
    "padding": {"padding": _pad},
    "both": {"mask": _causal, "padding": _pad}, "nothing kept": {"padding": _pad | (A(2)[:, None] == 1)}, "bias": {"mask": T(6, 6)},
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_torch_modules(mask: str, training: bool) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=mask == "both")
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu" if mask == "both" else "relu", batch_first=True, norm_first=n)
        for n in (True, False)
    ]
    m, p = MASKS[mask].get("mask"), MASKS[mask].get("padding")

    def run(x: Tensor) -> Any:
        y = mha(x, x, x, attn_mask=m, key_padding_mask=p, need_weights=False)[0]
        return y, [layer(x, src_mask=m, src_key_padding_mask=p) for layer in layers]

    for module in (mha, *layers):
        module.train(training).requires_grad_(training)
    reports: list[Report] = []
    eager, ours = (outcome(f, (_x,), training) for f in (run, compiled(run, reports)))
    for a, b in zip((*ours[0], *ours[1]), (*eager[0], *eager[1]), strict=True):
        agree(a, b, 1e-4, mask)
    assert sum(len(r.sites) for r in reports) == 3


_linear = nn.Linear(8, 8)


def heads(x: Tensor) -> Tensor:
    return _linear(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)


def window(x: Tensor) -> Tensor:
    i = A(x.shape[1])
    return scores(heads(x), heads(x)).masked_fill((i[:, None] - i >= x.shape[1] // 2) | (i > i[:, None]), -INF).softmax(-1) @ heads(
        x
    )


def folded(x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = heads(x).reshape(b * 2, n, 4)
    s = torch.bmm(q, q.transpose(1, 2)).view(b, 2, n, n) + torch.where(torch.ones(n, n, dtype=torch.bool).tril(), 0.0, -1e9)
    return torch.bmm(s.view(b * 2, n, n).softmax(-1), q).view(b, 2, n, 4)


def appended(x: Tensor) -> Tensor:
    q = heads(x)
    k = torch.cat([q, q[:, :, :3]], 2)
    return (scores(q, k) + torch.cat([A(q.shape[2]), A(q.shape[2])[:3]]) * 0.1).softmax(-1) @ k


def last_half(x: Tensor) -> Tensor:
    n = x.shape[1]
    return (scores(heads(x), heads(x)[:, :, -(n // 2) :]) + A(n)[-(n // 2) :] * 0.1).softmax(-1) @ heads(x)[:, :, -(n // 2) :]


def number(x: Tensor, c: float = 0.3) -> Tensor:
    return (scores(heads(x), heads(x)) * c).softmax(-1) @ heads(x)


def number_twice(x: Tensor, c: float = 0.3) -> Tensor:
    s = scores(heads(x), heads(x))
    return (s * c + s).softmax(-1) @ heads(x)


def number_to_sdpa(x: Tensor, c: float = 0.3) -> Tensor:
    return SDPA(heads(x), heads(x), heads(x), scale=c)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("f", [window, folded, appended, last_half, number, number_twice, number_to_sdpa])
def test_sizes_known_at_run_time(f: Callable[..., Tensor], dynamic: bool | None) -> None:
    """The values of eager at every size, and as many compiles as with the eager backend."""
    calls: list[tuple[Any, ...]] = [(T(2, 6, 8),), (T(3, 9, 8),), (T(2, 7, 8),), (T(1, 1, 8),)]
    if f.__name__.startswith("number"):
        calls = [(*call, c) for call, c in zip(calls, (0.3, 0.7, 0.9, 0.2), strict=True)]
    counter, reports = torch._dynamo.testing.CompileCounter(), list[Report]()
    torch._dynamo.reset()
    plainly = torch.compile(f, backend=counter, dynamic=dynamic)
    for call in calls:
        plainly(*call)
    ours = compiled(f, reports, dynamic=dynamic)
    for call in calls:
        agree(ours(*call), f(*call), 2e-5, f"{[*call[0].shape]}")
    assert len(reports) == counter.frame_count
