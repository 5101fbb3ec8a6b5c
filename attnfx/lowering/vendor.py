"""Plain attention through the vendor's kernels: torch's scaled_dot_product_attention, or cuDNN where that is fastest."""

from __future__ import annotations

import math

import sympy
import torch
from torch import Tensor
from torch.nn import functional

from attnfx.expr import ONE, TRUE
from attnfx.lowering import timeline, transforms
from attnfx.lowering.ops import LIBRARY
from attnfx.site import AttentionSite

LIBRARY.define("vendor_attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, float dropout, str site='') -> Tensor")

#: CUDA compute capabilities whose cuDNN attention beats flash.
CUDNN_MAJORS = (9, 10)
CUDNN_WIDEST = 128


def objections(site: AttentionSite) -> tuple[str, ...]:
    """Why torch's own attention cannot take the site exactly, one sentence each; empty where it can."""
    found, facts = list(site.uncomputable), site.facts
    if site.scale is None:
        found.append("the score program is more than a scale; torch's attention takes a scale only.")
    elif site.scale <= 0 or math.isinf(site.scale):
        found.append(f"the scale is {site.scale}; torch's attention takes a positive, finite one.")
    if site.side:
        found.append(f"the scores or the mask load from {len(site.side)} side tensors; torch's fast kernels take none.")
    if site.band is not None:
        found.append("the scores hold a second product, of the queries and a vector of each distance; torch's attention has one.")
    if site.skip is not None:
        found.append("tiles of small scores are left out; torch's attention computes all.")
    if site.order is not None:
        found.append("the tokens are counted in an order of their own; torch's attention counts them as they lie.")
    if site.sink is not None:
        found.append("the softmax has a sink; torch's attention has none.")
    if site.normaliser != "softmax":
        found.append("the exponentials are not divided by their sum; torch's attention divides.")
    if site.weight != ONE:
        found.append("the probabilities have a factor after the softmax; torch's attention takes none.")
    if site.keep != TRUE and facts.causal_offset != 0:
        found.append("the mask is neither full nor exactly j <= i.")
    elif site.keep != TRUE and sympy.expand(site.queries - site.keys) != 0:
        found.append(
            f"the mask is causal over {site.queries} queries and {site.keys} keys; torch's causal flag takes equal lengths."
        )
    elif site.device == "cpu" and site.head_dim != site.value_dim:
        found.append(f"head_dim is {site.head_dim} and value dim {site.value_dim}; torch's kernel for CPUs takes equal ones.")
    elif site.device == "cpu" and site.dropout:
        found.append(f"torch's kernel for CPUs has no dropout, and this one drops {site.dropout:g}.")
    elif site.keep != TRUE and site.fill > -1e30:
        found.append(f"the fill is {site.fill}, which real scores may reach; torch's attention drops masked keys.")
    if site.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found.append(f"the dtype is {site.dtype}; torch's attention takes floating types.")
    return tuple(found)


def is_causal(site: AttentionSite) -> bool:
    """The causal flag for a site without objections."""
    return site.keep != TRUE


def call(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, dropout: float, site: str = "") -> Tensor:
    """(B,H,M,D), (B,HK,N,D), (B,HK,N,DV) -> (B,H,M,DV); causal is j <= i. Differentiable. ``site`` names the call in a profiler's
    timeline where it runs; where a compiler traces it, :mod:`attnfx.lowering.vendor_names` does."""
    with timeline.named(site if timeline.runs(query) else ""):
        return _called(query, key, value, causal, scale, dropout)


def _called(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, dropout: float) -> Tensor:
    if 0 in query.shape[:3]:
        return _nothing(query, key, value)
    if _cudnn(query, key, value):
        # Fewer key heads than query heads are cuDNN's own business: nothing is repeated, and their gradients come back as they are.
        wants_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        found: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, wants_lse, dropout, causal, False, scale=scale
        )[0]
        return found
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cuda" and (query.dtype == torch.float32 or query.shape[3] != value.shape[3]):
        # Only torch's memory-efficient kernel takes these, and it has no groups: S x S scores otherwise.
        groups = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The empty result for an empty batch, no heads or no queries; torch's kernels for CPUs may divide by such a size."""
    groups = query.shape[1] // max(key.shape[1], 1)
    key, value = (t.repeat_interleave(max(groups, 1), 1) for t in (key, value))
    return query @ key.transpose(2, 3) @ value


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.device.type != "cuda" or torch.version.hip is not None or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    if not enabled or torch.cuda.get_device_capability(query.device)[0] not in CUDNN_MAJORS:
        return False
    if any(t.stride(3) != 1 for t in (query, key, value)):
        return False
    width = query.shape[3]
    return width == value.shape[3] and width <= CUDNN_WIDEST and width % 8 == 0 and key.shape[2] > 1 and query.shape[2] > 1


LIBRARY.impl("vendor_attention", call, "CompositeImplicitAutograd")
torch.library.register_vmap("attnfx::vendor_attention", transforms.vmap_vendor, lib=LIBRARY)
