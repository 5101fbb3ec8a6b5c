"""Whether a candidate computes what the reference does: nothing is timed before that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.lowering import portable
from attnfx.lowering.tuning.operands import Operands

#: Scores up to which the reference is the plan in torch operations, which take long for more.
REFERENCE_SCORES = 1 << 27
#: What a row of a result may differ by, in epsilons: the order of sums differs between tiles, and with it what is rounded.
HALF_EPSILONS, FULL_EPSILONS = 8.0, 256.0


def reference(operands: Operands, kernel: str) -> tuple[Tensor, ...] | None:
    """What a kernel should give, by the plan's torch operations in float32; None where that would take too long.

    Then the shipped configuration, which tests compare with float64, is what candidates are compared with.
    """
    o, plan = operands, operands.plan
    if o.q.shape[0] * o.q.shape[1] * o.q.shape[2] * o.k.shape[2] > REFERENCE_SCORES:
        return None
    if o.grad_out is None:
        order = plan.site.order
        q, k, v = (t if order is None else order.moved(t) for t in (o.q, o.k, o.v))
        found = portable.forward(plan, q, k, v, o.loads, o.sizes, o.seed)
        return found.out if order is None else order.back(found.out), found.lse
    if kernel not in ("query_gradient", "key_gradient"):
        return None  # the sums of a bias gradient come in the kernel's own layout
    saved = [t for t in (o.out, o.lse, o.row_max, o.row_sum, o.degenerate) if t is not None]
    dq, dk, dv, *_ = portable.backward(
        plan, o.q, o.k, o.v, o.loads, o.sizes, o.seed, portable.Result(*saved), o.grad_out, o.grad_lse
    )
    return (dq,) if kernel == "query_gradient" else (dk, dv)


def differs(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """How results differ from the wanted ones, computed from operands of a dtype; None where they do not, up to rounding."""
    for got, want in zip(found, wanted, strict=True):
        if got.shape != want.shape:
            return f"a result has the shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        limit = bound(torch.float32 if got.dtype == torch.float32 and dtype == torch.float32 else dtype)
        error = farthest_row(got, want)
        if not error <= limit:
            return f"a row differs by {error:.2g} (relative L2); rounding explains {limit:.2g}"
    return None


def bound(dtype: torch.dtype) -> float:
    """What a row may differ by for operands of a dtype."""
    return (FULL_EPSILONS if dtype == torch.float32 else HALF_EPSILONS) * torch.finfo(dtype).eps


def farthest_row(found: Tensor, wanted: Tensor) -> float:
    """The largest relative L2 distance of a row (of the last axis), rows below the root mean square taken for as large as that;
    infinite where infinities or NaNs are not in the same places."""
    got, want = found.float(), wanted.float()
    finite = want.isfinite()
    if not torch.equal(torch.where(finite, 0.0, want).nan_to_num(7.0), torch.where(finite, 0.0, got).nan_to_num(7.0)):
        return float("inf")
    if not want.numel():
        return 0.0
    got, want = torch.where(finite, got, 0.0), torch.where(finite, want, 0.0)
    size = want.norm(dim=-1)
    usual = size.square().mean().sqrt()
    rows = (got - want).norm(dim=-1) / size.clamp_min(max(float(usual), 1e-30))
    return float(rows.nan_to_num(float("inf")).max())
