"""The operators that attention becomes in a compiled graph: `attnfx::attention`, and `attnfx::flash` with its backward.

`attention` is what a graph is given: it builds relative tables and the window of a band, draws the dropout seed and applies
the sink with ordinary torch operations, which the compiler sees, and calls `flash`, which is opaque. `attention_lse` gives the
LSE too, `attention_unnormalised` exponentials that are not divided, their sums and maxima. The plan travels as JSON text, so
that a cached graph needs nothing else; `site`, the path of the module, names the call in a profiler's timeline and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering import bands, blocks, ordered, outside, portable, timeline
from attnfx.lowering.plan import KernelPlan

LIBRARY: Any = torch.library.Library("attnfx", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_FLASH = "Tensor query, Tensor key, Tensor value, Tensor[] loads, SymInt[] sizes, Tensor? seed, str plan"
_LISTS = "Tensor? row_blocks=None, Tensor? key_blocks=None, str site=''"
_LEFT_OUT: tuple[Any, ...] = (None, None, "")
_BLOCKS = (
    "Tensor[] loads, SymInt[] sizes, SymInt batch, SymInt heads, SymInt queries, SymInt keys, bool by_keys, Device device, str plan"
)
_RESULT = "Tensor out, Tensor lse, Tensor row_max, Tensor row_sum, Tensor degenerate"

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor[] loads, SymInt[] sizes, str plan, str site=''"
_ATTENTION = f"{_OPERANDS}, Tensor? row_blocks=None, Tensor? key_blocks=None"

LIBRARY.define(f"attention({_ATTENTION}) -> Tensor")
LIBRARY.define(f"attention_lse({_ATTENTION}) -> (Tensor out, Tensor lse)")
LIBRARY.define(f"attention_unnormalised({_ATTENTION}) -> (Tensor out, Tensor sums, Tensor maxima)")
LIBRARY.define(f"flash({_FLASH}, {_LISTS}) -> ({_RESULT})", tags=_TAGS)
LIBRARY.define(f"flash_backward({_FLASH}, {_RESULT}, Tensor grad_out, Tensor? grad_lse, {_LISTS}) -> Tensor[]", tags=_TAGS)
LIBRARY.define(f"blocks({_BLOCKS}) -> Tensor", tags=_TAGS)


def attention(
    query: Tensor, key: Tensor, value: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], plan: str, site: str = "",
    row_blocks: Tensor | None = None, key_blocks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B,H,M,D), (B,HK,N,D), (B,HK,N,DV) -> (B,H,M,DV): the attention that ``plan`` (text of a KernelPlan) describes.

    ``loads`` are the site's side tensors, ``sizes`` the values of its ``symbols``. Differentiable in query, key, value and
    the side tensors whose gradients were planned. ``row_blocks`` and ``key_blocks`` are the lists of tiles that the mask keeps,
    where they are known before the call (`fixed_lists.py`). Raises ValueError where there are not as many loads or sizes as
    the plan has.
    """
    if ordered.wanted(plan, query, key) and not ordered.fused(plan, query, (query, key, value, *loads)):
        found: Any = ordered.put(attention, query, key, value, loads, sizes, plan, site, row_blocks, key_blocks)
        return found  # type: ignore[no-any-return]
    return _attention(query, key, value, loads, sizes, plan, site, (row_blocks, key_blocks))[0][0]


def attention_lse(
    query: Tensor, key: Tensor, value: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], plan: str, site: str = "",
    row_blocks: Tensor | None = None, key_blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`attention`, and the LSE (B,H,M): the natural log of each row's softmax denominator, a sink's term included.

    float32, for a float64 query float64; -inf for a row whose keys are all -inf and that has no sink. Gradients flow through both.
    """
    if ordered.wanted(plan, query, key):
        found: Any = ordered.put(attention_lse, query, key, value, loads, sizes, plan, site, row_blocks, key_blocks)
        return found  # type: ignore[no-any-return]
    out, _ = _attention(query, key, value, loads, sizes, plan, site, (row_blocks, key_blocks), with_lse=True)
    return out


def attention_unnormalised(
    query: Tensor, key: Tensor, value: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], plan: str, site: str = "",
    row_blocks: Tensor | None = None, key_blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """sum_j exp(z_ij - m_i) v_j (B,H,M,DV), sum_j exp(z_ij - m_i) (B,H,M) and the row maxima m (B,H,M), for a plan of such a site.

    The latter two are float32, for a float64 query float64. Gradients flow through the first two, m taken for a constant.
    """
    if ordered.wanted(plan, query, key):
        found: Any = ordered.put(attention_unnormalised, query, key, value, loads, sizes, plan, site, row_blocks, key_blocks)
        return found  # type: ignore[no-any-return]
    (out, _), results = _attention(query, key, value, loads, sizes, plan, site, (row_blocks, key_blocks))
    return outside.unnormalised(out, results)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], plan: str, site: str,
    lists: tuple[Tensor | None, Tensor | None], with_lse: bool = False,
) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]]:  # fmt: skip
    """(O, LSE) of the site, and what the kernel gave."""
    read = KernelPlan.from_json(plan)
    if len(loads) != read.given:
        raise ValueError(f"{len(loads)} side tensors were given; the plan has {read.given}")
    values = read.values(sizes, key.shape[2], loads)
    tables = [t.build(query, key.shape[2], loads, values) for t in read.tables]
    if read.site.band is not None:
        tables.append(bands.build(read.site, loads, query.shape[2], key.shape[2], values))
    seed = None
    if read.site.dropout > 0.0:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=query.device)
    lists = blocks.of_call(plan, query, key, loads, values, lists)
    results = torch.ops.attnfx.flash(query, key, value, [*loads, *tables], sizes, seed, plan, *lists, site)
    out, lse = outside.applied(read, results, loads, values, with_lse) if read.has_outside else (results[0], results[1])
    if with_lse and read.shift is not None:
        lse = lse + outside.of_rows(read.shift, lse, loads, values)
    return (out, lse), results


def _flash_cpu(*args: Any) -> portable.Result:
    return _named_forward(_has_kernel(KernelPlan.from_json(args[6]), interpreted=True), *args)


def _flash_cuda(*args: Any) -> portable.Result:
    return _named_forward(_has_kernel(KernelPlan.from_json(args[6]), interpreted=False), *args)


def _named_forward(kernel: bool, *args: Any) -> portable.Result:
    *given, site = [*args, *_LEFT_OUT[len(args) - 7 :]]
    with timeline.named(site):
        return _forward(kernel, *given)


def _named_backward(kernel: bool, *args: Any) -> list[Tensor]:
    *given, site = [*args, *_LEFT_OUT[len(args) - 14 :]]
    with timeline.named(site, backward=True):
        return _backward(kernel, *given)


def _has_kernel(plan: KernelPlan, interpreted: bool) -> bool:
    """Whether the Triton kernels run this: on a CPU only inside Triton's interpreter."""
    return plan.family == "flash" and (not interpreted or os.environ.get("TRITON_INTERPRET") == "1")


def _forward(
    kernel: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    seed: Tensor | None,
    text: str,
    row_blocks: Tensor | None = None,
    key_blocks: Tensor | None = None,
) -> portable.Result:
    plan = KernelPlan.from_json(text)
    if not kernel or k.shape[2] == 0:
        return portable.forward(plan, q, k, v, loads, sizes, seed)
    from attnfx.lowering import replay

    def call() -> portable.Result:
        return _launched(plan, q, k, v, loads, sizes, seed, text, row_blocks)

    return replay.repeated(call, ("forward", text, *sizes), (q, k, v, seed, row_blocks, *loads))


def _launched(
    plan: KernelPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    seed: Tensor | None,
    text: str,
    row_blocks: Tensor | None,
) -> portable.Result:
    from attnfx.lowering import codegen, flash, handed
    from attnfx.lowering.tuning import calls, lookup
    from attnfx.lowering.tuning.operands import Operands

    tensors = handed.pointers(plan, k.shape[2], loads)
    numbers, program = handed.ints(plan, plan.values(sizes, k.shape[2], loads), tensors), codegen.program_of(text)
    walked = row_blocks if blocks.worthwhile(q.shape[2], k.shape[2]) else None
    if calls.requested(program.key):
        calls.prepare(Operands(text, q, k, v, tuple(loads), tuple(sizes), seed, walked))
    noise: dict[str, Any] = {"dropout_p": plan.site.dropout, "seed": seed}
    band = bands.arguments(plan.site, loads)
    out, r = lookup.safely(lambda: flash.forward(program, q, k, v, tensors, numbers, blocks=walked, band=band, **noise))
    return portable.Result(out, r.lse, r.row_max, r.row_sum, r.degenerate)


def _backward_cpu(*args: Any) -> list[Tensor]:
    return _named_backward(_has_kernel(KernelPlan.from_json(args[6]), interpreted=True), *args)


def _backward_cuda(*args: Any) -> list[Tensor]:
    return _named_backward(_has_kernel(KernelPlan.from_json(args[6]), interpreted=False), *args)


def _backward(
    kernel: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    seed: Tensor | None,
    text: str,
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    degenerate: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    row_blocks: Tensor | None = None,
    key_blocks: Tensor | None = None,
) -> list[Tensor]:
    plan, result = KernelPlan.from_json(text), portable.Result(out, lse, row_max, row_sum, degenerate)
    if not kernel or k.shape[2] == 0:
        return portable.backward(plan, q, k, v, loads, sizes, seed, result, grad_out, grad_lse)
    from attnfx.lowering import codegen, kernel_gradients, replay
    from attnfx.lowering.tuning import calls, lookup
    from attnfx.lowering.tuning.operands import Operands

    def call() -> list[Tensor]:
        lists = (row_blocks, key_blocks) if blocks.worthwhile(q.shape[2], k.shape[2]) else (None, None)
        if calls.requested(codegen.program_of(text).key):
            calls.prepare(Operands(text, q, k, v, tuple(loads), tuple(sizes), seed, *lists, *result, grad_out, grad_lse))
        return lookup.safely(
            lambda: kernel_gradients.backward(plan, q, k, v, loads, sizes, seed, result, grad_out, grad_lse, text, *lists)
        )

    tensors = (q, k, v, seed, *result, grad_out, grad_lse, row_blocks, key_blocks, *loads)
    return replay.repeated(call, ("backward", text, *sizes), tensors)


def _flash_fake(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], seed: Tensor | None, plan: str,
    *rest: Any,
) -> portable.Result:  # fmt: skip
    return portable.new_result(KernelPlan.from_json(plan), q, k, v)


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Any, seed: Any, plan: str, *rest: Any
) -> list[Tensor]:
    slots = [g.slot for g in KernelPlan.from_json(plan).gradients]
    return [t.new_empty(t.shape) for t in (q, k, v, *(loads[s] for s in slots))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, loads, sizes, seed, plan, *rest = inputs
    lists, ctx.site = rest[:2], (rest[2] if len(rest) > 2 else "")
    ctx.loads, ctx.sizes, ctx.has_seed, ctx.plan = len(loads), list(sizes), seed is not None, plan
    ctx.lists = [t is not None for t in lists]
    ctx.save_for_backward(q, k, v, *loads, *([seed] if seed is not None else []), *output, *(t for t in lists if t is not None))
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _flash_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    plan = KernelPlan.from_json(ctx.plan)
    q, k, v, *saved = ctx.saved_tensors
    loads, saved = saved[: ctx.loads], saved[ctx.loads :]
    seed, results = (saved[0], saved[1:]) if ctx.has_seed else (None, saved)
    results, saved = results[:5], iter(results[5:])
    lists = [next(saved) if given else None for given in ctx.lists]
    if plan.site.skip is not None:
        raise RuntimeError(
            "this attention leaves out tiles by their scores and has no gradient; call the model under torch.no_grad()"
        )
    _check_planned(plan, ctx.needs_input_grad[3])
    grads: list[Tensor | None] = [None] * ctx.loads
    # torch reads a list of numbers as one argument, and an empty list as a list of tensors
    no_sizes: list[None] | None = None if ctx.sizes else []
    nothing = (None,) * (len(ctx.needs_input_grad) - 5)  # arguments that were left out have no place
    if grad_out is None and grad_lse is None:
        return None, None, None, grads, no_sizes, *nothing
    grad_out = torch.zeros_like(results[0]) if grad_out is None else grad_out
    dq, dk, dv, *rest = torch.ops.attnfx.flash_backward(
        q, k, v, loads, ctx.sizes, seed, ctx.plan, *results, grad_out, grad_lse, *(lists or (None, None)), ctx.site
    )
    for gradient, grad in zip(plan.gradients, rest, strict=True):
        grads[gradient.slot] = grad
    return dq, dk, dv, grads, no_sizes, *nothing


def _blocks(
    loads: Sequence[Tensor], sizes: Sequence[int], batch: int, heads: int, queries: int, keys: int, by_keys: bool,
    device: torch.device, plan: str,
) -> Tensor:  # fmt: skip
    from attnfx.lowering import replay

    rest = (tuple(sizes), batch, heads, queries, keys, by_keys, device, plan)
    if not loads:  # one launch, of no tensor that would tell the device
        return blocks.build(loads, *rest)
    return replay.repeated(lambda: blocks.build(loads, *rest), ("blocks", *rest), loads)


def _blocks_fake(
    loads: Sequence[Tensor], sizes: Any, batch: int, heads: int, queries: int, keys: int, by_keys: bool, device: Any, plan: str
) -> Tensor:
    return torch.empty(blocks.shape(batch, heads, queries, keys, by_keys), dtype=torch.int32, device=device)


def _check_planned(plan: KernelPlan, needed: Sequence[bool]) -> None:
    planned = {g.slot for g in plan.gradients}
    for slot in plan.differentiated_slots:
        if needed[slot] and slot not in planned:
            raise RuntimeError(
                f"side tensor {slot} of this attention requires a gradient and the plan was made without one; compile the model "
                "again with requires_grad as it is now"
            )


def _register() -> None:
    import attnfx.lowering.linear.sites
    import attnfx.lowering.page_scores  # noqa: F401 - both register operators
    from attnfx.lowering import mapped, transforms

    LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")
    LIBRARY.impl("attention_lse", attention_lse, "CompositeImplicitAutograd")
    LIBRARY.impl("attention_unnormalised", attention_unnormalised, "CompositeImplicitAutograd")
    LIBRARY.impl("flash", _flash_cpu, "CPU")
    LIBRARY.impl("flash", _flash_cuda, "CUDA")
    LIBRARY.impl("flash_backward", _backward_cpu, "CPU")
    LIBRARY.impl("flash_backward", _backward_cuda, "CUDA")
    torch.library.register_fake("attnfx::flash", _flash_fake, lib=LIBRARY)
    LIBRARY.impl("blocks", _blocks, "CompositeExplicitAutograd")
    torch.library.register_fake("attnfx::blocks", _blocks_fake, lib=LIBRARY)
    torch.library.register_fake("attnfx::flash_backward", _backward_fake, lib=LIBRARY)
    torch.library.register_autograd("attnfx::flash", _flash_autograd, setup_context=_setup, lib=LIBRARY)
    second, kept = transforms.second_derivative, transforms.keep_inputs
    torch.library.register_autograd("attnfx::flash_backward", second, setup_context=kept, lib=LIBRARY)
    torch.library.register_vmap("attnfx::attention", transforms.vmap_attention, lib=LIBRARY)
    for name in ("attention_lse", "attention_unnormalised", "flash", "flash_backward", "blocks"):
        torch.library.register_vmap(f"attnfx::{name}", mapped.looped(name), lib=LIBRARY)


_register()
