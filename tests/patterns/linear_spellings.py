"""Attention without a softmax over keys as real code spells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, N, D, E = 2, 3, 6, 7, 4, 5
SELF = ((B, H, N, D), (B, H, N, D), (B, H, N, E))
CROSS = ((B, H, S, D), (B, H, N, D), (B, H, N, E))
LAST = ((B, N, H, D), (B, N, H, D), (B, N, H, E))
FIRST = ((B, H, D, N), (B, H, D, N), (B, H, E, N))


@dataclass(frozen=True)
class Linear:
    """A function, the shapes of its arguments, and the line of mathematics that its site must have (without the sizes)."""

    function: Callable[..., Any]
    formula: str
    shapes: tuple[tuple[int, ...], ...] = SELF
    extra: tuple[Any, ...] = ()

    def arguments(self) -> tuple[Any, ...]:
        torch.manual_seed(0)
        return (*(torch.randn(shape, dtype=torch.float64) for shape in self.shapes), *self.extra)


def elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def t(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


# Quadratic forms ------------------------------------------------------------------------------------------------------


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = elu1(q) @ t(elu1(k))
    return (w / w.sum(-1, keepdim=True)) @ v


def normalised_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.relu(q) @ t(torch.relu(k))
    return (w @ v) / (w.sum(-1, keepdim=True) + 1e-6)


def causal_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (elu1(q) @ t(elu1(k))).tril()
    return w @ v / w.sum(-1, keepdim=True).clamp(min=1e-3)


def causal_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    return (q @ t(k) / math.sqrt(D)).masked_fill(hidden, 0.0) @ v


def decay_parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    lag = i[:, None] - i[None, :]
    decay = torch.where(lag >= 0, 0.9 ** lag.double(), 0.0)
    return (q @ t(k) * decay) @ v


def retnet(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """torchscale's parallel retention."""
    index = torch.arange(N).to(gamma)
    mask = torch.tril(torch.ones(N, N).to(gamma))
    mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
    mask = torch.nan_to_num(torch.exp(mask * gamma[:, None, None]))
    mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
    w = q @ t(k) * mask
    w = w / w.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1)
    return torch.matmul(w, v).transpose(1, 2)


def retnet_magnitudes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torchscale's retention inside one chunk."""
    w = (q @ t(k)).tril()
    scale = w.detach().abs().sum(dim=-1, keepdim=True).clamp(min=1)
    return (w / scale) @ v


def relu_by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ t(k) * D**-0.5) / N @ v


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", F.relu(torch.einsum("bhid,bhjd->bhij", q, k) / N) ** 2, v)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ t(k) * 0.5 - math.log(N)) @ v


def sigmoid_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ t(k) * 0.5).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf"))
    return torch.sigmoid(s) @ v


def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.normalize(q, dim=-1) @ t(F.normalize(k, dim=-1)) / N) @ v


def taylor_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ t(k) * 0.5
    w = (1 + s + s * s / 2).tril()
    return (w @ v) / (w.sum(-1, keepdim=True) + 1e-12)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.relu(q @ t(k) + bias) @ v


def key_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    w = (elu1(q) @ t(elu1(k))) * mask[:, None, None, :]
    return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


# Linear forms ---------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (t(k) @ v)


def elu_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = elu1(q), elu1(k)
    return q @ (t(k) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))


def loftr(q: Tensor, k: Tensor, v: Tensor, q_mask: Tensor, kv_mask: Tensor) -> Tensor:
    """LoFTR's LinearAttention, itself that of fast-transformers, with masks."""
    q, k = elu1(q), elu1(k)
    q = q * q_mask[:, :, None, None]
    k = k * kv_mask[:, :, None, None]
    v = v * kv_mask[:, :, None, None]
    length = v.size(1)
    v = v / length
    kv = torch.einsum("nshd,nshv->nhdv", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhdv,nlh->nlhv", q, kv, z) * length


def fast_transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = elu1(q), elu1(k)
    kv = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z)


def performer(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """performer-pytorch's softmax kernel: random features, made positive."""

    def features(x: Tensor, is_query: bool) -> Tensor:
        dash = torch.einsum("...id,...jd->...ij", D**-0.25 * x, projection.expand(B, H, -1, -1))
        diagonal = (x**2).sum(-1, keepdim=True) / 2 * D**-0.5
        top = dash.amax(-1, keepdim=True) if is_query else dash.amax((-1, -2), keepdim=True)
        return 8**-0.5 * (torch.exp(dash - diagonal - top) + 1e-4)

    q, k = features(q, True), features(k, False)
    d_inv = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(-2))
    context = torch.einsum("...nd,...ne->...de", k, v)
    return torch.einsum("...de,...nd,...n->...ne", context, q, d_inv)


def efficientvit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LiteMLA: channels first, the row sum as one more value channel."""
    q, k = torch.relu(q), torch.relu(k)
    v = F.pad(v, (0, 0, 0, 1), mode="constant", value=1.0)
    out = torch.matmul(torch.matmul(v, t(k)), q)
    return out[:, :, :-1] / (out[:, :, -1:] + 1e-15)


def ddpm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.softmax(dim=-2) * 0.5, k.softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    return torch.einsum("bhde,bhdn->bhen", context, q)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """linear-attention-transformer: a softmax over head_dim of q, one over the sequence of k."""
    q, k = q.softmax(dim=-1) * D**-0.5, k.softmax(dim=-2)
    return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))


def causal_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """linear-attention-transformer's causal form with buckets of one."""
    q, k = q.softmax(dim=-1) * D**-0.5, torch.exp(k)
    q, k, v = (x.reshape(*x.shape[:-2], -1, 1, x.shape[-1]) for x in (q, k, v))
    sums = k.sum(dim=-2).cumsum(dim=-2)
    context = torch.einsum("bhund,bhune->bhude", k, v).cumsum(dim=-3)
    d_inv = 1.0 / torch.einsum("bhud,bhund->bhun", sums, q).clamp(min=1e-3)
    return torch.einsum("bhund,bhude,bhun->bhune", q, context, d_inv).reshape(B, H, N, E)


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = elu1(q), elu1(k)
    state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)


def cumulative_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.cumsum(torch.einsum("bnhd,bnhe->bnhde", k, v), dim=1)
    return torch.einsum("bnhd,bnhde->bnhe", q, state)


def squared_relu_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = torch.relu(q) ** 2, torch.relu(k).square()
    return torch.einsum("bhid,bhde->bhie", q, torch.einsum("bhjd,bhje->bhde", k, v)) / (
        (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    )


def exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    z = torch.einsum("bhid,bhd->bhi", q, k.sum(2)).reciprocal()
    return (q @ (t(k) @ v)) * z[..., None]


def query_normalised_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    q = q * (1.0 / torch.einsum("nhld,nhd->nhl", q + 1e-6, k.sum(2) + 1e-6))[..., None]
    return q @ (t(k) @ v)


def galerkin(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, gv: Tensor) -> Tensor:
    k, v = F.layer_norm(k, (D,), gk), F.layer_norm(v, (E,), gv)
    return torch.matmul(q, torch.matmul(t(k), v) / N)


def folded_heads(x: Tensor) -> Tensor:
    q, k, v = x.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4).reshape(3, B * H, N, D)
    q, k = elu1(q), elu1(k)
    o = torch.bmm(q, torch.bmm(t(k), v)) / torch.bmm(q, k.sum(1).unsqueeze(-1))
    return o.view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)


def shared_key_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return torch.tril(q @ t(k)) @ v


def sizes_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = elu1(q), elu1(k)
    return q @ (t(k) @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """flash-linear-attention's naive parallel form of a gated head: cumulative log gates as a decay."""
    c = g.cumsum(-1)
    decay = (c[..., :, None] - c[..., None, :]).exp()
    w = (q * D**-0.5) @ t(k) * decay
    w = w.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), 0)
    return w @ v


def values_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Only the values are masked, not the row sum."""
    q, k = elu1(q), elu1(k)
    v = v * mask[:, None, :, None]
    return (q @ (t(k) @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def values_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same by masked_fill."""
    q, k = elu1(q), elu1(k)
    v = v.masked_fill(~mask[:, None, :, None], 0.0)
    return (q @ (t(k) @ v)) / (q @ k.sum(-2).unsqueeze(-1))


MASK = torch.tensor([[True] * 5 + [False] * 2, [True] * N])
SPELLINGS: dict[str, Linear] = {
    "normalised weights": Linear(normalised, "Σ_j w v / Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)"),
    "normalised result": Linear(normalised_after, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = max(q, 0)·max(k, 0)", CROSS),
    "causal, clamped": Linear(causal_normalised, "Σ_j w v / max(l, 0.001), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1) | causal"),
    "causal by masked_fill": Linear(causal_masked_fill, "Σ_j w v, w = (q·k)·0.5 | causal"),
    "retention decay from arange": Linear(decay_parallel, "Σ_j w v, w = (q·k)·pow(0.9, fp64(i - j)) | causal"),
    "torchscale RetNet": Linear(
        retnet,
        "Σ_j w v / max(|l|, 1), l = Σ_j w, w = (q·k)·T0[h, i, j]/T1[h, i, 0]",
        extra=(torch.tensor([-0.03, -0.01, -0.005], dtype=torch.float64),),
    ),
    "torchscale RetNet chunk": Linear(retnet_magnitudes, "Σ_j w v / max(l, 1), l = Σ_j |w|, w = q·k | causal"),
    "relu scores by length": Linear(relu_by_length, "Σ_j w v, w = max((q·k)·0.5, 0)·0.142857", CROSS),
    "squared relu scores": Linear(squared_relu, "Σ_j w v, w = pow(max((q·k)/7, 0), 2)"),
    "sigmoid": Linear(sigmoid, "Σ_j w v, w = sigmoid((q·k)·0.5 - 1.94591)", CROSS),
    "sigmoid, causal": Linear(sigmoid_causal, "Σ_j w v, w = sigmoid((q·k)·0.5) | causal"),
    "cosine": Linear(cosine, "Σ_j w v, w = (q·k)·0.142857"),
    "Taylor of the scores": Linear(
        taylor_scores, "Σ_j w v / (l + 1e-12), l = Σ_j w, w = (q·k)·0.5 + 1 + (q·k)·0.5·(q·k)·0.5/2 | causal"
    ),
    "relu with a bias": Linear(
        biased,
        "Σ_j w v, w = max((q·k) + T0[h, i, j], 0)",
        extra=(torch.linspace(-1, 1, H * N * N, dtype=torch.float64).view(H, N, N),),
    ),
    "key padding": Linear(
        key_padding, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1) | T0[b, 0, 0, j]", extra=(MASK,)
    ),
    "plain": Linear(plain, "Σ_j w v, w = q·k", CROSS),
    "elu, normalised": Linear(elu_normalised, "Σ_j w v / Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", CROSS),
    "LoFTR with masks": Linear(
        loftr,
        "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1) | T0[b, i, 0, 0] ∧ T1[b, j, 0, 0]",
        LAST,
        (MASK, MASK),
    ),
    "fast-transformers": Linear(fast_transformers, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", LAST),
    "performer": Linear(
        performer,
        "Σ_j w v / Σ_j w, w = ((exp(q) + 0.0001)·(exp(k) + 0.0001))·0.125",
        extra=(torch.linspace(-1, 1, 8 * D, dtype=torch.float64).view(8, D),),
    ),
    "EfficientViT": Linear(efficientvit, "Σ_j w v / (l + 1e-15), l = Σ_j w, w = max(q, 0)·max(k, 0)", FIRST),
    "ddpm": Linear(ddpm, "Σ_j w v, w = (softmax_d(q)·softmax_j(k))·0.5", FIRST),
    "efficient attention": Linear(efficient, "Σ_j w v, w = (softmax_d(q)·softmax_j(k))·0.5"),
    "causal efficient attention": Linear(
        causal_efficient, "Σ_j w v / max(l, 0.001), l = Σ_j w, w = (softmax_d(q)·exp(k))·0.5 | causal"
    ),
    "running sum": Linear(cumulative, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1) | causal"),
    "running sum by einsum": Linear(cumulative_einsum, "Σ_j w v, w = q·k | causal", LAST),
    "squared relu features": Linear(
        squared_relu_features, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (pow(max(q, 0), 2))·(max(k, 0)·max(k, 0))", CROSS
    ),
    "exponential features": Linear(exponential, "Σ_j w v / Σ_j w, w = exp(q)·exp(k)"),
    "query divided first": Linear(query_normalised_first, "Σ_j w v, w = (sigmoid(q)·sigmoid(k))·T0[b, h, i]"),
    "Galerkin": Linear(
        galerkin, "Σ_j w v, w = (q·k)·0.142857", extra=(torch.ones(D, dtype=torch.float64), torch.ones(E, dtype=torch.float64))
    ),
    "folded heads": Linear(folded_heads, "Σ_j w v / Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", ((B, N, 3 * H * D),)),
    "shared key heads": Linear(shared_key_heads, "Σ_j w v, w = q·k | causal", ((B, 4, N, D), (B, 2, N, D), (B, 2, N, E))),
    "one batch, one head": Linear(
        sizes_of_one, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", ((1, 1, S, D), (1, 1, N, D), (1, 1, N, E))
    ),
    "one query": Linear(
        sizes_of_one, "Σ_j w v / (l + 1e-06), l = Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", ((B, H, 1, D), (B, H, N, D), (B, H, N, E))
    ),
    "gated head": Linear(simple_gla, "Σ_j w v, w = (q·k)·0.5·exp(T0[b, h, i, 0] - T1[b, h, 0, j]) | causal", (*SELF, (B, H, N))),
    "masked values": Linear(values_masked, "Σ_j w v / Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", extra=(MASK,)),
    "filled values": Linear(values_filled, "Σ_j w v / Σ_j w, w = (elu(q) + 1)·(elu(k) + 1)", extra=(MASK,)),
}
