"""What torch.func and higher derivatives make of the operators: vmap as more of the batch, second derivatives as plain torch.

`vmap` of an attention whose formula does not name the batch is an attention of a larger batch, one call. Any other is called
once for each
example. The gradient's own gradient (`create_graph=True`) is that of the formula in plain torch operations, which forms tensors of
S x S elements, as the model's own second derivative does. Forward mode and functorch's own `grad` never meet the operators: such
a graph stays as it was (:mod:`attnfx.graphs.levels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attnfx import expr
from attnfx.expr import INDEX
from attnfx.lowering import bands, mapped
from attnfx.lowering.plan import KernelPlan
from attnfx.sites.reference import attention as plain_attention

#: The arguments of ``attnfx::flash_backward`` before the lists of tiles, which may be left out; the two gradients are the last.
_GIVEN = 14


def vmap_attention(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The vmap rule of ``attnfx::attention``: (query, key, value, loads, sizes, plan), mapped anywhere in q, k, v or the loads."""
    plan = KernelPlan.from_json(args[5])
    named = any(INDEX["b"] in expr.symbols(e) for e in (plan.site.score, plan.site.keep, *(t.recipe for t in plan.tables)))
    if (
        named
        or plan.site.band is not None
        or any(d is not None for d in tree_leaves(in_dims[3]))
        or plan.site.dropout > 0.0
        or plan.symbols
    ):
        return mapped.looped("attention")(info, in_dims, *args)
    return _folded(torch.ops.attnfx.attention, info.batch_size, in_dims, args)


def vmap_vendor(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The vmap rule of ``attnfx::vendor_attention``: (q, k, v, causal, scale, dropout, site)."""
    if args[5] > 0.0:
        return mapped.looped("vendor_attention")(info, in_dims, *args)
    return _folded(torch.ops.attnfx.vendor_attention, info.batch_size, in_dims, args)


def _folded(operator: Any, examples: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Tensor, int]:
    """One call with (examples * B, H, S, D) for the first three arguments."""
    operands = []
    for t, dim in zip(args[:3], in_dims[:3], strict=True):
        first = t.unsqueeze(0).expand(examples, *t.shape) if dim is None else t.movedim(dim, 0)
        operands.append(first.reshape(examples * first.shape[1], *first.shape[2:]))
    out: Tensor = operator(*operands, *args[3:])
    return out.reshape(examples, out.shape[0] // max(examples, 1), *out.shape[1:]), 0


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves what :func:`second_derivative` needs of a call of ``attnfx::flash_backward``."""
    q, k, v, loads, sizes, _, plan = inputs[:7]
    grad_out, grad_lse = inputs[_GIVEN - 2 : _GIVEN]
    ctx.loads, ctx.sizes, ctx.plan, ctx.with_lse = len(loads), list(sizes), plan, grad_lse is not None
    ctx.save_for_backward(q, k, v, *loads, grad_out)


def second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """The gradient of ``attnfx::flash_backward`` in q, k, v, the loads with planned gradients and grad_out; again differentiable.

    Raises NotImplementedError for an attention with dropout, one whose LSE has a gradient, or exponentials that nothing divides.
    """
    plan = KernelPlan.from_json(ctx.plan)
    if plan.site.dropout > 0.0 or ctx.with_lse or plan.site.normaliser != "softmax":
        undivided = plan.site.normaliser != "softmax"
        what = "exponentials that nothing divides" if undivided else "one whose log-sum-exp is used"
        what = "one with dropout" if plan.site.dropout > 0.0 else what
        raise NotImplementedError(
            f"attnfx computes second derivatives of attention, but not of {what}; run the model without attnfx."
        )
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        q, k, v, *rest = (_apart(t) for t in ctx.saved_tensors)
        loads, grad_out = rest[:-1], rest[-1]
        out = _plain(plan, q, k, v, loads, ctx.sizes)
        wanted = [q, k, v, *(loads[g.slot] for g in plan.gradients)]
        first = torch.autograd.grad(out, wanted, grad_out.to(out.dtype), create_graph=True, allow_unused=True)
        followed = [(f, g) for f, g in zip(first, tree_leaves(list(grads)), strict=True) if f is not None and g is not None]
        sources = [*wanted, grad_out]
        second = _grad(followed, sources, again)
    by_slot: list[Tensor | None] = [None] * ctx.loads
    for gradient, found in zip(plan.gradients, second[3:-1], strict=True):
        by_slot[gradient.slot] = found
    no_sizes: list[None] | None = None if ctx.sizes else []
    nothing = (None,) * (_GIVEN - 9)
    lists = (None,) * (len(ctx.needs_input_grad) - _GIVEN)  # only where they were given
    return (*second[:3], by_slot, no_sizes, None, None, *nothing, second[-1], None, *lists)


def _plain(plan: KernelPlan, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    values = plan.values(sizes, k.shape[2], loads)
    q, k, v = (t.float() if t.dtype.itemsize < 4 else t for t in (q, k, v))
    site = bands.from_window(plan.site, q.shape[2])
    return plain_attention(site, q, k, v, loads, [values[s] for s in site.symbols])[0]


def _grad(followed: Sequence[tuple[Tensor, Tensor]], sources: Sequence[Tensor], again: bool) -> tuple[Tensor | None, ...]:
    outputs = [(f, g) for f, g in followed if f.requires_grad]
    if not outputs:
        return (None,) * len(sources)
    results, weights = zip(*outputs, strict=True)
    return torch.autograd.grad(results, sources, weights, create_graph=again, allow_unused=True)


def _apart(t: Tensor) -> Tensor:
    """``t`` as a tensor of its own: the same memory and, where it has one, the same history."""
    if not t.is_floating_point():
        return t
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
