"""`attnfx::linear_attention` and `attnfx::linear_attention_states`, over the opaque `attnfx::linear` and its gradient."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering import timeline
from attnfx.lowering.linear import portable
from attnfx.lowering.mapped import looped
from attnfx.lowering.ops import _TAGS, LIBRARY

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? decay"
_OPTIONS = "bool causal=True, bool normalize=False, float eps=0.0"
_STATE = "Tensor? state=None, Tensor? state_sums=None, str divisor='add', float scale=1.0, str site=''"
_RESULT = "Tensor out, Tensor sums, Tensor final_state, Tensor final_sums"
_GRADIENTS = "Tensor grad_out, Tensor? grad_sums, Tensor? grad_state, Tensor? grad_state_sums"

LIBRARY.define(f"linear_attention({_OPERANDS}=None, {_OPTIONS}, {_STATE}) -> Tensor")
LIBRARY.define(f"linear_attention_states({_OPERANDS}=None, {_OPTIONS}, {_STATE}) -> ({_RESULT})")
_CORE = f"{_OPERANDS}, Tensor? state, Tensor? state_sums"
_PLAIN = "bool causal, bool normalize, float eps, str divisor, float scale, str site"
LIBRARY.define(f"linear({_CORE}, {_PLAIN}) -> ({_RESULT})", tags=_TAGS)
LIBRARY.define(f"linear_backward({_CORE}, Tensor out, Tensor sums, {_GRADIENTS}, {_PLAIN}) -> Tensor[]", tags=_TAGS)


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None = None, causal: bool = True, normalize: bool = False,
    eps: float = 0.0, state: Tensor | None = None, state_sums: Tensor | None = None, divisor: str = "add", scale: float = 1.0,
    site: str = "",
) -> Tensor:  # fmt: skip
    """(B,H,M,D), (B,HK,N,D), (B,HK,N,DV) -> (B,H,M,DV): scale sum_j lam^(p(i)-j) (q_i . k_j) v_j over the keys of query i.

    Feature maps come before. ``decay`` (H): log lam, a constant to gradients; it needs ``causal``, where query i stands at
    p(i) = i + N - M and sees j <= p(i). ``normalize`` divides by the sum l of the weights and ``eps``, or by another of
    ``DIVISORS``: "max" is max(l, eps), "max_abs" max(|l|, eps), and "max held" takes it for a constant. ``state`` (B,H,D,DV) and
    ``state_sums`` (B,H,D) stand for keys before the first. ``site`` names the call in a profiler's timeline. Raises ValueError for
    what does not fit.
    """
    return linear_attention_states(query, key, value, decay, causal, normalize, eps, state, state_sums, divisor, scale, site)[0]


def linear_attention_states(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None = None, causal: bool = True, normalize: bool = False,
    eps: float = 0.0, state: Tensor | None = None, state_sums: Tensor | None = None, divisor: str = "add", scale: float = 1.0,
    site: str = "",
) -> portable.Result:  # fmt: skip
    """:func:`linear_attention`, the sums of the weights (B,H,M) without ``eps``, and the state behind the last key with its sums.

    float32, for a float64 query float64; both kinds of sums are empty where nothing is normalised. Gradients flow through all.
    """
    _check(query, key, value, decay, causal, normalize, state, state_sums)
    if divisor not in portable.DIVISORS:
        raise ValueError(f'the divisor is "{divisor}"; known: {", ".join(portable.DIVISORS)}')
    ahead = key.shape[2] - query.shape[2] if causal else 0
    if ahead:  # what all queries see is a state
        none = query[:, :, :0]
        before = torch.ops.attnfx.linear(
            none, key[:, :, :ahead], value[:, :, :ahead], decay, state, state_sums, False, normalize, eps, divisor, scale, site
        )
        state, state_sums = before[2], before[3] if normalize else None
        key, value = key[:, :, ahead:], value[:, :, ahead:]
    options = (causal, normalize, eps, divisor, scale, site)
    return portable.Result(*torch.ops.attnfx.linear(query, key, value, decay, state, state_sums, *options))


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, causal: bool, normalize: bool, state: Tensor | None, sums: Tensor | None
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; linear attention takes 4 each")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; supported: one floating type")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} key heads; supported: a multiple")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys under a causal mask; supported: no more queries than keys")
    if decay is not None and (not causal or decay.shape != (q.shape[1],)):
        raise ValueError(f"a decay of shape {tuple(decay.shape)}, causal={causal}; supported: one number a head, causal")
    if decay is not None and decay.requires_grad:
        raise ValueError("the decay requires a gradient, and linear attention has none for it")
    whole = (q.shape[0], q.shape[1], q.shape[3])
    for name, given, shape in (("state", state, (*whole, v.shape[3])), ("state_sums", sums, whole)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}; supported: {tuple(shape)}")
    if sums is not None and not normalize:
        raise ValueError("state_sums are given and nothing is normalised")
    if normalize and (state is None) != (sums is None):
        raise ValueError("a state that is normalised has sums, and sums have a state: one of the two is missing")


def _has_kernel(q: Tensor) -> bool:
    """Whether the Triton kernels run this: on a GPU, and on a CPU inside Triton's interpreter, but not in float64."""
    placed = q.is_cuda or (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return placed and q.dtype in (torch.float16, torch.bfloat16, torch.float32) and find_spec("triton") is not None


def _linear(*args: Any) -> portable.Result:
    *given, site = args
    with timeline.named(site):
        return _forward(*given)


def _linear_backward(*args: Any) -> list[Tensor]:
    *given, site = args
    with timeline.named(site, backward=True):
        return _backward(*given)


def _forward(*args: Any) -> portable.Result:
    if not _has_kernel(args[0]):
        return _plain(*args)
    from attnfx.lowering import replay
    from attnfx.lowering.linear import kernels

    tensors, options = args[:6], args[6:]
    return replay.repeated(lambda: kernels.forward(*args), ("linear", *options), tensors)


def _plain(q: Tensor, *args: Any) -> portable.Result:
    """In torch operations, the output laid as the kernels lay it."""
    made = portable.forward(_scaled(q, args[-1]), *args[:-1])
    return made._replace(out=portable.laid_like(q, made.out.shape[3], made.out.dtype).copy_(made.out))


def _scaled(q: Tensor, scale: float) -> Tensor:
    return q if scale == 1.0 else q * scale


def _backward(*args: Any) -> list[Tensor]:
    if not _has_kernel(args[0]):
        q, *rest, scale = args
        dq, *more = portable.backward(_scaled(q, scale), *rest)
        return [_scaled(dq, scale), *more]
    from attnfx.lowering import replay
    from attnfx.lowering.linear import kernels

    tensors, options = args[:12], args[12:]
    return replay.repeated(lambda: kernels.backward(*args), ("linear backward", *options), tensors)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, sums: Tensor | None, causal: bool,
    normalize: bool, eps: float, divisor: str, scale: float, site: str,
) -> portable.Result:  # fmt: skip
    (batch, heads, m, d), dv, wide = q.shape, v.shape[3], portable.wide_of(q)
    rows, totals = ((batch, heads, m), (batch, heads, d)) if normalize else ((0,), (0,))
    return portable.Result(
        portable.laid_like(q, dv, v.dtype), q.new_empty(rows, dtype=wide), q.new_empty((batch, heads, d, dv), dtype=wide),
        q.new_empty(totals, dtype=wide),
    )  # fmt: skip


def _backward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    normalize, wide = rest[-5], portable.wide_of(q)
    state = q.new_empty((*q.shape[:2], q.shape[3], v.shape[3]), dtype=wide)
    sums = q.new_empty((*q.shape[:2], q.shape[3]) if normalize else (0,), dtype=wide)
    return [*(portable.laid_like(t, t.shape[3], t.dtype) for t in (q, k, v)), state, sums]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.normalize, ctx.eps, ctx.divisor, ctx.scale, ctx.site = inputs
    ctx.given = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None), output[0], output[1])
    ctx.set_materialize_grads(False)
    if not ctx.normalize:
        ctx.mark_non_differentiable(output[1], output[3])


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if all(g is None for g in grads):
        return (None,) * 6 + nothing
    *saved, out, sums = ctx.saved_tensors
    stored = iter(saved)
    tensors = [next(stored) if given else None for given in ctx.given]
    grad_out, grad_sums, grad_state, grad_state_sums = grads
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    options = (ctx.causal, ctx.normalize, ctx.eps, ctx.divisor, ctx.scale, ctx.site)
    made = torch.ops.attnfx.linear_backward(*tensors, out, sums, grad_out, grad_sums, grad_state, grad_state_sums, *options)
    states = [g.to(t.dtype) if t is not None else None for g, t in zip(made[3:], tensors[4:], strict=True)]
    return *made[:3], None, *states, *nothing


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.causal, ctx.normalize, ctx.eps, ctx.divisor, ctx.scale, ctx.site = inputs
    ctx.given = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def _second(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradient of the gradient: torch's own, of the chunks in torch operations. The results that were given are functions of
    the operands, in whose gradients their part is."""
    stored = iter(ctx.saved_tensors)
    tensors = [next(stored) if given else None for given in ctx.given]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # q, k, v, decay, state, state_sums, out, sums, and the gradients of the four results
        apart: list[Any] = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors
        ]
        q, k, v, decay, state, state_sums = apart[:6]
        options = (ctx.causal, ctx.normalize, ctx.eps, ctx.divisor)
        results = portable.forward(_scaled(q, ctx.scale), k, v, decay, state, state_sums, *options)
        paired = [(r, g) for r, g in zip(results, apart[8:], strict=True) if g is not None and r.requires_grad]
        wanted = [(apart[n], g) for n, g in zip((0, 1, 2, 4, 5), grads, strict=True) if apart[n] is not None and g is not None]
        outputs, weights = [r for r, _ in paired], [g.to(r.dtype) for r, g in paired]
        first = torch.autograd.grad(outputs, [t for t, _ in wanted], weights, create_graph=True, allow_unused=True)
        followed = [(f, g.to(f.dtype)) for f, (_, g) in zip(first, wanted, strict=True) if f is not None and f.requires_grad]
        sources = [n for n, t in enumerate(apart) if t is not None and n not in (3, 6, 7)]
        second: list[Tensor | None] = [None] * len(apart)
        if followed:
            outputs, weights = [f for f, _ in followed], [g for _, g in followed]
            found = torch.autograd.grad(outputs, [apart[n] for n in sources], weights, create_graph=again, allow_unused=True)
            for n, grad in zip(sources, found, strict=True):
                second[n] = grad
    return *second, *(None,) * 6


def _register() -> None:
    LIBRARY.impl("linear_attention", linear_attention, "CompositeImplicitAutograd")
    LIBRARY.impl("linear_attention_states", linear_attention_states, "CompositeImplicitAutograd")
    LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
    LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("attnfx::linear", _fake, lib=LIBRARY)
    torch.library.register_fake("attnfx::linear_backward", _backward_fake, lib=LIBRARY)
    torch.library.register_autograd("attnfx::linear", _autograd, setup_context=_setup, lib=LIBRARY)
    torch.library.register_autograd("attnfx::linear_backward", _second, setup_context=_keep_inputs, lib=LIBRARY)
    for name in ("linear", "linear_backward"):
        torch.library.register_vmap(f"attnfx::{name}", looped(name), lib=LIBRARY)


_register()
