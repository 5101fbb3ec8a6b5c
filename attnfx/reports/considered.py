"""What could have run an attention and does not, with the reason: the other half of a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnfx.lowering import vendor
from attnfx.site import AttentionSite

#: Names of the ways to run an attention, as reports have them, and what each is.
WAYS = {
    "vendor": "torch's own fused attention",
    "flash": "a generated Triton kernel",
    "portable": "the same mathematics in torch operations over blocks",
    "linear": "linear attention, with a state that goes along the keys",
    "kept": "the model's own operations",
}


@dataclass(frozen=True)
class Considered:
    """A way to run an attention that was not chosen: its name in :data:`WAYS`, or a variant as a policy writes it, and why not."""

    way: str
    objections: tuple[str, ...]


def not_chosen(
    site: AttentionSite,
    chosen: str,
    family: str,
    *,
    asked: str = "",
    measured: str = "",
    failed: Sequence[str] = (),
) -> tuple[Considered, ...]:
    """Every way but ``chosen``, in the order of preference.

    ``family``: the lowering of this device and dtype; ``asked``: the rule that asks for the variant that is chosen;
    ``measured``: why torch's own kernel lost; ``failed``: those of the lowering.
    """
    found = []
    for way in WAYS:
        if way != chosen and not (way == "linear" and site.exponential):
            exact = asked and way in ("vendor", "kept")
            found.append(Considered(way, (asked,) if exact else _why_not(site, way, chosen, family, measured, failed)))
    return tuple(found)


def _why_not(site: AttentionSite, way: str, chosen: str, family: str, measured: str, failed: Sequence[str]) -> tuple[str, ...]:
    if way == "kept":
        return (f"{WAYS[chosen][0].upper()}{WAYS[chosen][1:]} takes their place, with the same result.",)
    if way == "linear":
        return tuple(failed)
    if not site.exponential:
        return ("Its weights are no exponentials of the scores.",)
    if way == "vendor":
        return vendor.objections(site) or (measured,)
    if way == "flash" and family != "flash":
        return not_on_a_gpu(site)
    if failed:
        return tuple(failed)
    if chosen == "vendor":
        return ("It would compute the same; torch's own kernel is taken where nothing has to be added to it.",)
    return (f"It is for devices and dtypes without generated kernels; this is {site.dtype} on {site.device}.",)


def not_on_a_gpu(site: AttentionSite) -> tuple[str, ...]:
    """Why no Triton kernel runs a site here."""
    kernels = (torch.float16, torch.bfloat16, torch.float32)
    if site.dtype not in kernels:
        return (f"The dtype is {site.dtype}; the generated kernels take float16, bfloat16 and float32.",)
    if site.device != "cuda":
        return (f"The tensors are on {site.device}; the generated kernels run on a GPU.",)
    return ("Triton is not installed here.",)
