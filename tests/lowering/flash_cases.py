"""What a flash case is, its float64 meaning, and the comparison of every output and gradient with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering.call import Program
from attnfx.lowering.configs import Config
from attnfx.lowering.flash import backward, backward_short, bias_gradient, forward, is_short
from attnfx.lowering.gradients import BiasGradient
from attnfx.lowering.short import bias_sums

SCALE, CAP = 0.25, 2.0
# relative L2 error against float64 on the same (rounded) inputs: forward, gradients
TOLERANCE = {torch.float32: (3e-6, 1e-5), torch.float16: (1.5e-3, 3e-3), torch.bfloat16: (1e-2, 2e-2)}
MIN32 = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Case:
    """One attention: sizes, program, side tensors, and the same thing said in torch (`logits`, `keep`, `weight`)."""

    name: str
    program: Program
    sizes: tuple[int, int, int, int, int, int, int] = (2, 4, 2, 37, 53, 16, 16)  # B, H, HK, M, N, D, DV
    loads: Callable[[Any, torch.device], tuple[Tensor, ...]] = lambda case, device: ()
    ints: tuple[int, ...] | Callable[[Any, tuple[Tensor, ...]], tuple[int, ...]] = ()
    logits: Callable[..., Tensor] = lambda case, dot, loads: dot * SCALE
    keep: Callable[..., Tensor] | None = None
    weight: Callable[..., Tensor] | None = None
    bias: tuple[str, bool, bool] | None = None  # kind, batch_broadcast, head_broadcast of loads[0]
    dropout: float = 0.0
    layout: str = "contiguous"
    grad_lse: bool = True
    dtype: torch.dtype = torch.float32
    block: int = 16
    slack: float = 1.0
    extras: dict[str, Any] = field(default_factory=dict)


def tensors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the case's layout."""
    b, h, hk, m, n, d, dv = case.sizes
    shapes = (b, h, m, d), (b, hk, n, d), (b, hk, n, dv)
    made = [torch.randn(shape, device=device).to(case.dtype) for shape in shapes]
    if case.layout == "heads last":
        made = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
    if case.layout == "transposed":
        made = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in made]
    if case.layout == "expanded":
        made = [made[0], made[1][:1].expand(shapes[1]), made[2][:, :1].expand(shapes[2])]
    if case.layout == "strided":
        made = [t.repeat_interleave(3, -1)[..., ::3] for t in made]
    return made[0], made[1], made[2]


def meaning(
    case: Case, q: Tensor, k: Tensor, v: Tensor, loads: tuple[Tensor, ...], dropped: Tensor | None
) -> tuple[Tensor, Tensor]:
    """O and natural LSE in float64: the whole score matrix, filled as eager fills it."""
    program, group = case.program, q.shape[1] // k.shape[1]
    dot = q @ k.repeat_interleave(group, 1).transpose(-1, -2)
    z = case.logits(case, dot, loads)
    if case.keep is not None:
        keep = case.keep(case, loads).to(z.device).expand(z.shape)
        fill = program.fill if program.exact_rows else -math.inf
        z = z + torch.where(keep, 0.0, fill) if program.additive else torch.where(keep, z, fill)
    empty = (z == -math.inf).all(-1, keepdim=True)
    if program.exact_rows:
        empty = torch.zeros_like(empty)
    z = torch.where(empty, 0.0, z)
    weights = torch.where(empty, 0.0, torch.softmax(z, -1))
    lse = torch.where(empty[..., 0], -math.inf, torch.logsumexp(z, -1))
    if dropped is not None:
        weights = weights * dropped
    if case.weight is not None:
        weights = weights * case.weight(case, loads).to(weights)
    return weights @ v.repeat_interleave(group, 1), lse


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance; infinite where the NaNs or infinities are not in the same places."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    same = torch.where(finite, 0.0, got) if got.shape == want.shape else want.new_full((), math.nan)
    if not torch.equal(same.nan_to_num(nan=7.0), torch.where(finite, 0.0, want).nan_to_num(nan=7.0)):
        return math.inf
    distance = (torch.where(finite, got - want, 0.0)).norm() / torch.where(finite, want, 0.0).norm().clamp_min(1e-3)
    return math.inf if distance.isnan() else distance.item()


def dropout_mask(case: Case, q: Tensor, k: Tensor, loads: tuple[Tensor, ...], ints: tuple[int, ...], seed: Tensor) -> Tensor:
    """(B,H,M,N) of 0 or 1 / (1 - p), read off a forward whose values are the identity matrix."""
    b, hk, n = k.shape[:3]
    eye = torch.eye(n, device=k.device, dtype=k.dtype).expand(b, hk, n, n)
    config = Config(case.block, case.block, 4, 2)
    weights, _ = forward(
        replace(case.program, weight=None), q, k, eye, loads, ints, dropout_p=case.dropout, seed=seed, config=config
    )
    return (weights != 0).double() / (1 - case.dropout)


def run(case: Case, device: torch.device, config: Config | None = None, seed_value: int = 0) -> dict[str, float]:
    """Every output's and gradient's error over its tolerance: at most 1 passes."""
    torch.manual_seed(seed_value)
    q, k, v = tensors(case, device)
    loads = case.loads(case, device)
    ints = case.ints(case, loads) if callable(case.ints) else case.ints
    seed = torch.tensor([1234567890123], device=device) if case.dropout else None
    noise: dict[str, Any] = {"dropout_p": case.dropout, "seed": seed}
    dropped = dropout_mask(case, q, k, loads, ints, seed) if seed is not None else None

    out, residuals = forward(case.program, q, k, v, loads, ints, config=config, **noise)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(residuals.lse) if case.grad_lse else None
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    exact_loads = tuple(t.double().requires_grad_() if t.is_floating_point() else t for t in loads)
    want, want_lse = meaning(case, exact[0], exact[1], exact[2], exact_loads, dropped)
    loss = (want * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + torch.where(want_lse.isinf(), 0.0, want_lse * grad_lse.double()).sum()
    wanted = [*exact, *(t for t in exact_loads if t.is_floating_point())]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)

    configs = {"query_config": config, "key_config": config} if config else {}
    given = (case.program, q, k, v, out, residuals, grad_out, loads, ints)
    tile = None
    if config is None and is_short(q, k, v) and q.shape[1] == k.shape[1]:
        *got, tile = backward_short(*given, inside=False if case.bias else None, grad_lse=grad_lse, **noise)
    else:
        got = backward(*given, grad_lse=grad_lse, **noise, **configs)
    forward_limit, gradient_limit = (limit * case.slack for limit in TOLERANCE[case.dtype])
    errors = {
        "out": error(out, want) / forward_limit,
        "lse": error(residuals.lse, want_lse) / TOLERANCE[torch.float32][0],
    }
    for name, mine, theirs in zip(("dq", "dk", "dv"), got, grads, strict=False):
        errors[name] = error(mine, theirs) / gradient_limit
    if case.bias is not None:
        kind, batch, head = case.bias
        if tile is not None and batch:
            mine = bias_sums(BiasGradient(0, kind, batch, head, ()), tile)
        else:
            mine = bias_gradient(
                *given, kind=kind, batch_broadcast=batch, head_broadcast=head, grad_lse=grad_lse, config=config, **noise
            )
        errors["dbias"] = error(mine.reshape(grads[3].shape), grads[3]) / gradient_limit
    return errors
