"""Plain attention, which the vendor's kernels and the generated ones can both run: which of them is faster here.

The vendor's are, wherever it was measured. So only a search looks, on tensors of noise when a graph is compiled: these kernels are
no operator of ours that could look at its first call.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnfx.errors import AttnfxWarning
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.tuning import cache, calls, lookup, search
from attnfx.lowering.tuning.entries import Comparison
from attnfx.lowering.tuning.operands import Operands
from attnfx.lowering.tuning.shapes import Shape
from attnfx.site import AttentionSite

#: The share of the vendor's time that the generated kernels must save to be preferred.
WORTH = 0.05
#: How many times as long as the vendor's they may take before a search: more, no configuration makes up for.
REACH = 1.5
_KERNEL = "plain"


def compared(site: AttentionSite) -> Comparison | None:
    """What a search found for a plain attention of known sizes; None where none looked."""
    found = _place(site)
    entry = None if found is None else lookup.table(found[0]).get(found[2])
    return entry if isinstance(entry, Comparison) else None


def prefers_generated(site: AttentionSite) -> Comparison | None:
    """The comparison, where the generated kernels won it by enough."""
    if site.device != "cuda" or not torch.cuda.is_available():
        return None
    known = lookup.table(_device(site))
    if not any(isinstance(entry, Comparison) for entry in known.values()):
        return None  # without reading a site that nobody looked at
    found = compared(site)
    return found if found is not None and found.generated_ms <= (1.0 - WORTH) * found.vendor_ms else None


def settle(sites: Sequence[AttentionSite]) -> bool:
    """Compare the two for each plain attention that was not compared; whether the generated kernels are to be preferred for one."""
    for site in dict.fromkeys(sites):
        if site.device != "cuda" or (place := _place(site)) is None or compared(site) is not None:
            continue
        device, text, name = place
        who = cache.identity(device)
        if who is None:
            continue
        try:
            with _disable_current_modes():
                lookup.replace(device, cache.add(who, {name: compare(site, text, device)}))
        except Exception as error:  # a measurement that fails decides nothing
            why = f"attnfx could not compare the kernels of a plain attention ({type(error).__name__}: {error})."
            warnings.warn(why, AttnfxWarning, stacklevel=2)
    return any(prefers_generated(site) is not None for site in sites)


def compare(site: AttentionSite, text: str, device: torch.device, timer: search.Timer = calls.timer) -> Comparison:
    """Times of both on noise, forward, and backward where the site wants gradients; the generated kernels tuned, unless they are
    too far behind for that."""
    forward = noise(site, text, device)
    passes = [forward]
    if site.requires_grad:
        with torch.no_grad():
            passes.append(forward.following(forward.v.new_ones(forward.results()[0].shape)))
    theirs = _vendors(site, forward, timer)

    def generated() -> float:
        return sum(timer(partial(_run, call), search.FINE) for call in passes)

    ours = generated()
    if ours <= REACH * theirs:
        for call in passes:
            _tune(call)
        ours = generated()
    about = f"{Shape.of(forward.q, forward.k, forward.v)}: {site}"[:300]
    return Comparison(round(theirs, 5), round(ours, 5), about, str(datetime.date.today()))


def _vendors(site: AttentionSite, call: Operands, timer: search.Timer) -> float:
    from attnfx.lowering import vendor

    q, k, v = (t.detach().requires_grad_(site.requires_grad) for t in (call.q, call.k, call.v))
    causal, scale = vendor.is_causal(site), site.scale
    assert scale is not None

    def attend() -> None:
        with torch.no_grad():
            vendor.call(q, k, v, causal, scale, 0.0)

    spent = timer(attend, search.FINE)
    if site.requires_grad:
        with torch.enable_grad():
            out = vendor.call(q, k, v, causal, scale, 0.0)
        grad = torch.ones_like(out)
        spent += timer(lambda: _gradients(out, (q, k, v), grad), search.FINE)
    return spent


def noise(site: AttentionSite, text: str, device: torch.device) -> Operands:
    """A call of a plain site's plan on noise of its own, so that the caller's random numbers stay what they are."""
    batch, heads, key_heads, queries, keys = (int(n) for n in (site.batch, site.heads, site.key_heads, site.queries, site.keys))
    generator = torch.Generator(device).manual_seed(0)

    def made(heads: int, length: int, width: int) -> Tensor:
        # laid out as projections give it
        shape = (batch, length, heads, width)
        return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(site.dtype).transpose(1, 2)

    q, k, v = made(heads, queries, site.head_dim), made(key_heads, keys, site.head_dim), made(key_heads, keys, site.value_dim)
    return Operands(text, q, k, v, (), ())


def _gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(out, tuple(inputs), grad, retain_graph=True)


def _run(call: Operands) -> None:
    call.results()


def _tune(operands: Operands) -> None:
    calls.request(operands.program.key)
    calls.prepare(operands)


def _device(site: AttentionSite) -> torch.device:
    return torch.device(site.device, torch.cuda.current_device()) if site.device == "cuda" else torch.device(site.device)


def _place(site: AttentionSite) -> tuple[torch.device, str, str] | None:
    """The device of a site, the text of its plan, and the name of its comparison; None where there can be none."""
    sizes = (site.batch, site.heads, site.key_heads, site.queries, site.keys)
    if site.dropout or not all(n.is_Integer and n > 0 for n in sizes):
        return None
    plan = make_plan(site, "flash")
    if not isinstance(plan, KernelPlan) or plan.symbols or plan.tables:
        return None
    from attnfx.lowering import codegen

    text = plan.to_json()
    batch, heads, key_heads, queries, keys = map(int, sizes)
    shape = Shape(batch, heads, key_heads, queries, keys, site.head_dim, site.value_dim, site.dtype)
    kernel = f"{_KERNEL} {'training' if site.requires_grad else 'inference'}"
    return _device(site), text, shape.key(codegen.program_of(text).key, kernel)
