"""Modules of linear attention as their papers' code writes them, small: heads, projections and the attention itself."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 16, 2
D = WIDTH // HEADS


class Heads(nn.Module):
    """Projections, the heads (B,H,N,D) of queries, keys and values, and a projection of what `attend` makes of them."""

    key_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, self.key_heads * D), nn.Linear(WIDTH, self.key_heads * D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, HEADS, D).transpose(1, 2)
        k, v = (proj(x).view(b, n, self.key_heads, D).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))


class LinearTransformer(Heads):
    """Katharopoulos et al. 2020, causal, by running sums."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("nhld,nhlm->nhldm", k, v).cumsum(dim=2)
        z = 1 / (torch.einsum("nhld,nhld->nhl", q, k.cumsum(2)) + 1e-6)
        return torch.einsum("nhld,nhldm,nhl->nhlm", q, kv, z)


class QuadraticLinearTransformer(Heads):
    """The same from weights of all pairs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        w = torch.tril(torch.einsum("nhld,nhsd->nhls", q, k))
        return torch.einsum("nhls,nhsd->nhld", w / (w.sum(-1, keepdim=True) + 1e-6), v)


class CosFormer(Heads):
    """Qin et al. 2022, causal: relu, and positions in the angles of a quarter of a turn."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        q, k = F.relu(q), F.relu(k)
        angle = (math.pi / 2 * torch.arange(1, n + 1, dtype=q.dtype) / n)[:, None]
        q = torch.cat([q * torch.sin(angle), q * torch.cos(angle)], -1)
        k = torch.cat([k * torch.sin(angle), k * torch.cos(angle)], -1)
        kv = torch.cumsum(torch.einsum("nhld,nhlm->nhldm", k, v), dim=2)
        qkv = torch.einsum("nhld,nhldm->nhlm", q, kv)
        denom = torch.clamp_min(torch.einsum("nhlm,nhlm->nhl", q, torch.cumsum(k, dim=2)), 1e-6)
        return qkv / denom.unsqueeze(-1)


class RetNet(Heads):
    """Sun et al. 2023, parallel: a decay for each head, from `arange`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        gamma = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), HEADS, dtype=q.dtype))
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        mask = torch.where(i >= j, gamma[:, None, None] ** (i - j), 0.0)
        return (q @ k.transpose(-1, -2) * mask * D**-0.5) @ v


class TorchscaleRetNet(Heads):
    """The same as torchscale spells it: logarithms of decays in a buffer, and an infinite distance to what is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.log(1 - 2 ** (-5 - torch.arange(HEADS, dtype=torch.float))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        index = torch.arange(n).to(self.decay)
        mask = torch.tril(torch.ones(n, n).to(self.decay))
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
        mask = torch.nan_to_num(torch.exp(mask * self.decay[:, None, None]))
        scale = mask.sum(dim=-1, keepdim=True).sqrt()
        mask = mask / scale
        qk = q @ (k * D**-0.5).transpose(-1, -2) * mask
        qk = qk / qk.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1)
        return torch.matmul(qk, v)


class GammaRetNet(Heads):
    """A small RetNet: gamma a number of the module, NaN put away by a boolean index."""

    gamma = 0.96875

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(q.shape[2]).unsqueeze(1)
        m = torch.arange(q.shape[2]).unsqueeze(0)
        decay = ((self.gamma ** (n - m)) * (n >= m).float()).to(q.dtype)
        decay[decay != decay] = 0
        return (q @ k.transpose(-1, -2) * decay.unsqueeze(0)) @ v


class Lightning(Heads):
    """TransNormer's decay: slopes as ALiBi's in a buffer, nothing divided."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope_rate", torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        distance = i[:, None] - i[None, :]
        decay = torch.exp(-self.slope_rate * distance.abs())
        qk = torch.matmul(F.silu(q), F.silu(k).transpose(-1, -2)) * decay
        return torch.matmul(qk.masked_fill(distance < 0, 0.0), v)


class GroupedLinear(Heads):
    """Fewer key heads than query heads, repeated."""

    key_heads = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS, 1) for x in (k, v))
        w = (q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)) * torch.tril(torch.ones(q.shape[2], q.shape[2], dtype=q.dtype))
        return (w @ v) / w.sum(-1, keepdim=True).clamp(min=1e-3)


class FavorPlus(Heads):
    """Performer's positive random features, causal as performer-pytorch's plain version has it: eps on the running sum of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(12, D, generator=torch.Generator().manual_seed(0)))

    def features(self, x: Tensor, is_query: bool) -> Tensor:
        x = x * D**-0.25
        dash = x @ self.projection.T
        diagonal = (x**2).sum(-1, keepdim=True) / 2
        top = dash.amax(-1, keepdim=True) if is_query else dash.amax((-1, -2), keepdim=True)
        return 12**-0.5 * (torch.exp(dash - diagonal - top.detach()) + 1e-4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.features(q, True), self.features(k, False)
        k_cumsum = k.cumsum(dim=-2)
        d_inv = 1.0 / torch.einsum("...nd,...nd->...n", q, k_cumsum.type_as(q) + 1e-6)
        context = torch.einsum("...nd,...ne->...nde", k, v).cumsum(dim=-3)
        return torch.einsum("...nde,...nd,...n->...ne", context, q, d_inv)


class FlowAttention(Heads):
    """Flowformer (Wu et al. 2022), causal: sources compete, sinks allocate, all by running sums."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        eps = 1e-6
        q, k = torch.sigmoid(q), torch.sigmoid(k)
        normal = (torch.arange(q.shape[2]) + 1.0)[None, None, :].to(q.dtype)
        sink = 1.0 / torch.einsum("nhld,nhld->nhl", q + eps, k.cumsum(dim=2) + eps)
        source = 1.0 / torch.einsum("nhld,nhld->nhl", k + eps, q.cumsum(dim=2) + eps)
        conserved_sink = torch.einsum("nhld,nhld->nhl", q + eps, (k * source[..., None]).cumsum(dim=2) + eps) / normal
        conserved_source = torch.einsum("nhld,nhld->nhl", k + eps, (q * sink[..., None]).cumsum(dim=2) + eps) / normal
        allocation = torch.sigmoid(conserved_sink)
        competition = torch.exp(torch.clamp(conserved_source, min=-1.0, max=1.0))
        competition = (competition / competition.cumsum(dim=-1)) * normal
        kv = torch.einsum("nhld,nhlm->nhldm", k, v * competition[..., None]).cumsum(dim=2)
        return torch.einsum("nhld,nhldm->nhlm", q * sink[..., None], kv) * allocation[..., None]


class ReluViT(Heads):
    """Attention of an image without a softmax, from weights of all pairs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.relu(q) @ F.relu(k).transpose(-1, -2)
        return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


class Padded(Heads):
    """Keys of padding are masked; the weights are divided before the product."""

    def forward(self, x: Tensor) -> Tensor:
        self.mask = (x[..., 0] > -1.0)[:, None, None, :]
        return super().forward(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
        w = (w * self.mask).tril()
        return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


LOWERED: dict[str, type[Any]] = {
    c.__name__: c
    for c in (LinearTransformer, QuadraticLinearTransformer, CosFormer, RetNet, TorchscaleRetNet, GammaRetNet, Lightning,
              GroupedLinear, FavorPlus, FlowAttention, ReluViT, Padded)
}  # fmt: skip
