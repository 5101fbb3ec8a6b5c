"""What a plan leaves outside of the kernel: the sink, and the part of the weight that no key changes. Plain torch operations.

    L  = log(exp(sink) + exp(lse))                   the log of the whole denominator
    O  = exp(lse - L) * outer * O_kernel             sigmoid(lse - sink) is exp(lse - L)

Both are factors of a row, so autograd differentiates them, and the kernel's gradient of its LSE does the rest:
dS = P * (dP - delta + dLSE), Dao et al. 2022 (arXiv:2205.14135) with one term more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.expr import INDEX, Call, Expr, Int, Load

if TYPE_CHECKING:
    from attnfx.lowering.plan import KernelPlan


def split(weight: Expr) -> tuple[Expr | None, Expr | None]:
    """(the factors of ``weight`` that depend on the key, those that do not); None where there is none but 1."""
    inside: Expr | None = None
    outside: Expr | None = None
    for factor in _factors(expr.cast(weight, torch.float32) if not weight.dtype.is_floating_point else weight):
        if expr.is_number(factor, 1):
            continue
        if expr.depends_on(factor, "j"):
            inside = factor if inside is None else expr.mul(inside, factor)
        else:
            outside = factor if outside is None else expr.mul(outside, factor)
    return inside, outside


def _factors(e: Expr) -> list[Expr]:
    if isinstance(e, Call) and e.op == "mul" and all(a.dtype.is_floating_point for a in e.args):
        return [f for a in e.args for f in _factors(a)]
    return [e]


def applied(
    plan: KernelPlan, kernel: Sequence[Tensor], loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int], with_lse: bool
) -> tuple[Tensor, Tensor]:
    """(O (B,H,M,DV), LSE (B,H,M)) of the site, from the kernel's results (out, lse, row_max, row_sum, ...).

    ``loads`` are the caller's side tensors, ``values`` what the plan's size symbols are. Differentiable in the kernel's out and
    lse and in ``loads``. Without ``with_lse`` the second result is the kernel's own.
    """
    out, lse = kernel[0], kernel[1]
    scale: Tensor | None = None
    total = lse
    if plan.site.sink is not None:
        # a sink of +inf is NaN in any softmax
        sink = of_rows(plan.site.sink, lse, loads, values)
        sink = sink.masked_fill(sink == math.inf, math.nan)
        margin = _margin(plan, kernel, sink)
        scale = torch.sigmoid(margin)
        if plan.site.empty_rows == "zero":
            scale = scale.masked_fill(lse == -math.inf, 0.0)
        if with_lse:
            total = _total(lse, sink, margin)
    if plan.outer is not None:
        outer = of_rows(plan.outer, lse, loads, values)
        scale = outer if scale is None else scale * outer
    if scale is not None:
        out = (out * scale[..., None]).to(out.dtype)
    return out, total


def unnormalised(out: Tensor, kernel: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(out times the row sums, the row sums, the row maxima) of kernel results (out, lse, row_max, row_sum, ...).

    d row_sum / d lse is row_sum while the maximum stands still; an infinite LSE, whose row is NaN in eager, is NaN here.
    """
    _, lse, row_max, row_sum, *_ = kernel
    total = row_sum.abs() * (1.0 + (lse - lse.detach()))
    maxima = row_max.masked_fill(row_sum.isnan() & row_max.isfinite(), math.nan)
    return (out * total[..., None]).to(out.dtype), total, maxima


def _margin(plan: KernelPlan, kernel: Sequence[Tensor], sink: Tensor) -> Tensor:
    """lse - sink; where rows keep their maximum and sum apart, as exact as these are: an LSE near finfo.min has lost its sum."""
    margin = kernel[1] - sink
    if not plan.exact_rows:
        return margin
    with torch.no_grad():
        lost = (kernel[2] - sink) + kernel[3].abs().log() - margin
        lost = lost.masked_fill(~margin.isfinite(), 0.0)
    return margin + lost


def _total(lse: Tensor, sink: Tensor, margin: Tensor) -> Tensor:
    """log(exp(lse) + exp(sink)), its gradients from their exact difference ``margin``; no infinity meets one of the other sign."""
    softplus = torch.nn.functional.softplus
    total = torch.where(margin > 0.0, lse + softplus(-margin), sink + softplus(margin))
    return torch.where(sink == -math.inf, lse, total)


def of_rows(e: Expr, like: Tensor, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int]) -> Tensor:
    """``e`` over b, h, i as (B or 1, H or 1, M or 1), in the dtype of ``like`` (B,H,M)."""
    grid = {
        name: torch.arange(like.shape[axis], device=like.device).view([-1 if axis == k else 1 for k in range(3)])
        for axis, name in enumerate("bhi")
    }
    wide = torch.float64 if like.dtype == torch.float64 else None
    views = {n: _view(n, like, loads) for n in expr.walk(e) if isinstance(n, Load)}
    known: dict[Expr, Tensor] = {
        n: t.to(wide) if wide is not None and t.is_floating_point() else t for n, t in views.items() if t is not None
    }
    found = evaluate(e, grid, loads, values, dtype=wide, known=known).to(like.dtype)
    while found.dim() < 3:
        found = found[None]
    return found


def _view(load: Load, like: Tensor, loads: Sequence[Tensor]) -> Tensor | None:
    """A load indexed by b, h, i themselves as a view, whose gradient needs no scatter; None for another."""
    assert isinstance(load.slot, int)
    names = [next((n for n, s in INDEX.items() if isinstance(x, Int) and x.value == s), None) for x in load.indices]
    zero = [isinstance(x, Int) and x.value == 0 for x in load.indices]
    kept = [n for n in names if n]
    if not all(n or z for n, z in zip(names, zero, strict=True)) or len(set(kept)) < len(kept):
        return None
    lengths = dict(zip("bhi", like.shape, strict=True))
    part = loads[load.slot]
    for axis in range(len(names) - 1, -1, -1):
        name = names[axis]
        part = part.select(axis, 0) if name is None else part.narrow(axis, 0, lengths[name])
    part = part.permute([kept.index(n) for n in "bhi" if n in kept])
    return part[tuple(slice(None) if n in kept else None for n in "bhi")]
