"""What real code does around a softmax: sinks, second masks, guards, gates, late divisions, sums of products, learned scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, einsum

B, H, M, D = 2, 4, 9, 8
Case = tuple[Callable[..., Any], tuple[Tensor, ...], str]
CASES: dict[str, Case] = {}


def _tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAWN, dtype=torch.float64)


_DRAWN = torch.Generator().manual_seed(3)
QKV = tuple(_tensor(B, H, M, D) for _ in range(3))
BIAS, HEADS, SINKS = _tensor(M, M), _tensor(H), _tensor(H)
REACH = _tensor(M, D)
KEEP = torch.rand((B, 1, M, M), generator=_DRAWN) > 0.4
KEEP[0, 0, 3] = False
INF, LOW = float("-inf"), torch.finfo(torch.float64).min
DATA = "softmax(q·k | T0[b, 0, i, j])"


def case(formula: str, *extra: Tensor) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of q, k, v and ``extra`` with the formula of its site, "" for none."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        CASES[f.__name__] = (f, (*QKV, *extra), formula)
        return f

    return register


# A column without a value -------------------------------------------------------------------------------------------------


@case("softmax((q·k)·0.3 + T0[i, j] | full, sink T1[h])", BIAS, SINKS)
def sink_behind(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    s = q @ k.mT * 0.3 + bias
    joined = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1)], -1)
    joined = joined - joined.max(-1, keepdim=True).values
    return F.softmax(joined, -1)[..., :-1] @ v


@case("softmax(q·k | full, sink T0[h])", SINKS)
def sink_in_front(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    joined = torch.cat([sinks.view(1, -1, 1, 1).expand(B, H, M, 1), q @ k.mT], -1)
    return joined.softmax(-1)[..., 1:] @ v


@case("")
def a_key_is_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[..., :-1] @ v[..., :-1, :]


# Probabilities that are changed -------------------------------------------------------------------------------------------


@case(DATA, KEEP)
def masked_again(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, INF).softmax(-1).masked_fill(~keep, 0) @ v


@case(DATA, KEEP)
def masked_low_and_again(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, LOW).softmax(-1).masked_fill(~keep, 0) @ v


@case(DATA, KEEP)
def guarded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, INF).softmax(-1).nan_to_num(0.0) @ v


@case(DATA, KEEP)
def guarded_by_where(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    p = (q @ k.mT).masked_fill(~keep, INF).softmax(-1)
    return torch.where(torch.isnan(p), torch.zeros_like(p), p) @ v


@case(DATA, KEEP)
def multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~keep, INF).softmax(-1) * keep) @ v


@case("fp64(T0[b, 0, i, j])·softmax(q·k | full)", KEEP)
def gated(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).mul(keep.double()) @ v


@case("T0[0, h, 0, 0]·softmax(q·k | full)", HEADS)
def head_mask(q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * heads.view(1, -1, 1, 1)) @ v


@case("", KEEP)
def renormalised(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1) * keep
    return p / (p.sum(-1, keepdim=True) + 1e-6) @ v


@case("", BIAS)
def added_to(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) + bias.softmax(-1)) @ v


@case("softmax(q·k | full)")
def read_by_others(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q @ k.mT).softmax(-1)
    return p @ v, p.mean(1)


@case("softmax(q·k | full)")
def beside_another_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q @ k.mT).softmax(-1)
    return p @ v, p.mT @ k


# Softmax in other words ---------------------------------------------------------------------------------------------------


@case("softmax(q·k + T0[i, j] | full)", BIAS)
def divided_last(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT + bias
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


@case("softmax((q·k)·0.3 | full)")
def divided_last_and_moved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = einsum("bhid,bhjd->bhij", q, k) * 0.3
    e = torch.exp(s - s.max(-1, keepdim=True)[0].detach())
    return einsum("bhij,bhjd->bihd", e, v) / e.sum(-1).transpose(1, 2).unsqueeze(-1)


@case("")
def divided_by_another_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT * 0.1).exp()
    return (e @ v) / e.sum(-2)[..., None]


@case("softmax(q·k | full)")
def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).log_softmax(-1).exp() @ v


@case("softmax(q·k | full)")
def less_its_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s - torch.logsumexp(s, -1, keepdim=True)).exp() @ v


# Scores -------------------------------------------------------------------------------------------------------------------


@case("softmax((q·k)·0.3 + T0[i, j] | full)", BIAS)
def latent(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    plain, turned, latents = q[..., :5].transpose(1, 2), q[..., 5:].transpose(1, 2), k[:, 0]
    s = einsum("bshc,btc->bsht", plain, latents[..., :5]) + einsum("bshr,btr->bsht", turned, v[:, 0, :, 5:])
    return einsum("bsht,btc->bshc", (s * 0.3 + bias.unsqueeze(1)).softmax(-1), latents)


@case("softmax((q·k)·0.3 + T0[i, j] | full)", BIAS)
def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    p = ((q[:, :, :, None] * k[:, :, None]).sum(-1) * 0.3 + bias).softmax(-1)
    return (p[..., None] * v[:, :, None]).sum(-2)


@case("softmax(q·k | full)")
def keys_of_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = k[:, :, None] + q[:, :, :, None], v[:, :, None] + q[:, :, :, None]
    return einsum("bhij,bhijd->bhid", einsum("bhid,bhijd->bhij", q, keys).softmax(-1), values)


@case("softmax(q·k | full)", HEADS)
def cosine(q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Tensor:
    scale = torch.clamp(heads, max=math.log(100)).exp()[:, None, None]
    return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * scale).softmax(-1) @ v


@case("softmax((q·k)·2 | full)", BIAS)
def scale_of_each_key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * bias[0].view(1, 1, 1, -1) * 2).softmax(-1) @ v


@case("softmax(q·k + T0[b, h, i, j] | full)", REACH)
def sized_by_the_scores(q: Tensor, k: Tensor, v: Tensor, reach: Tensor) -> Tensor:
    s = q @ k.mT
    bias = einsum("bhid,jd->bhij", q, reach).reshape(-1, M).reshape_as(s)
    return (s + bias.type_as(s) + torch.zeros_like(s)).softmax(-1) @ v


@case("")
def changed_by_their_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s - s.mean(2, keepdim=True)).softmax(-1) @ v


@case("")
def heads_mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.arange(H * H, dtype=q.dtype).view(H, H) / H
    return einsum("gh,bhij->bgij", mix, q @ k.mT).softmax(-1) @ v
