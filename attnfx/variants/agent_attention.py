"""Agent attention: a few agents, pooled from the queries, attend to all keys, and all queries to the agents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor
from torch.nn import functional

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, linear
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class AgentAttention(Variant):
    """O = softmax(s' Q A^T) softmax(s A K^T) V + shortcut V, where A are `agents` means of neighbouring queries.

    Means along the list of tokens (adaptive average pooling); the paper pools an image's rows and columns, which a site does not
    know. s is the model's scale, s' the same or `second_scale`; the paper's learned biases and its convolution of V are left out.
    `shortcut` is what its training-free form for diffusion adds of the values, 0.075 there.
    """

    agents: int = 49
    shortcut: float = 0.0
    second_scale: float = 0.0

    paper: ClassVar[str] = "Han et al. 2023, Agent Attention: On the Integration of Softmax and Linear Attention (arXiv:2312.08874)"
    exactness: ClassVar[str] = "another function than softmax: approximate without training, better with"

    def __post_init__(self) -> None:
        whole_number(self, "agents", least=1)
        for name in ("shortcut", "second_scale"):
            given: object = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
                raise PolicyError(f"AgentAttention.{name} is {given!r}; it must be a number that is not negative.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(5), causal=False), Example(cls(4, 0.075, 0.5), causal=False), Example(cls(3), queries=13, causal=False),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*linear.objections(site, "agent attention", causal=False)]
        if self.shortcut:
            found += linear.square(site, "the shortcut")
        if not site.queries.is_Integer or site.queries < self.agents:
            found.append(
                f"There are {site.queries} queries for {self.agents} agents; pooling needs a known number, at least as many."
            )
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, n = attend.site, sympy.Integer(self.agents)
        rows = torch.transpose(torch.flatten(query, 0, 1), 1, 2)
        pooled = torch.transpose(functional.adaptive_avg_pool1d(rows, self.agents), 1, 2)
        agents = torch.reshape(pooled, (attend.number(site.batch), attend.number(site.heads), self.agents, site.head_dim))
        gathered = attend(site.replace(queries=n), agents, key, value)
        score = expr.Score() * (self.second_scale or site.scale or 1.0)
        out = attend(site.replace(key_heads=site.heads, keys=n, score=score), query, agents, gathered)
        return out + linear.spread(attend, value) * self.shortcut if self.shortcut else out

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return self.agents * (site.queries + site.keys)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, n = q.shape[2], k.shape[2], self.agents
        spans = [(a * M // n, -(-(a + 1) * M // n)) for a in range(n)]
        A = torch.stack([q[:, :, start:end].mean(2) for start, end in spans], 2)
        kept = torch.ones(1, 1, dtype=torch.bool, device=q.device)
        gathered = dense.attention(A, k, v, scale, kept.expand(n, N))
        out = dense.attention(q, A, gathered, self.second_scale or scale, kept.expand(M, n))
        return out + self.shortcut * dense.grouped(v, q) if self.shortcut else out
