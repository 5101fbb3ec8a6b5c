"""Based: linear attention with second-order Taylor features beside softmax in a short window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, features, linear
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number
from attnfx.variants.linear_attention import WIDEST_TAYLOR
from attnfx.variants.taylor_window import near_site


@dataclass(frozen=True)
class Based(Variant):
    """O = w O_taylor + (1 - w) O_window: weights 1 + z + z^2 / 2 of all keys that are seen, and softmax of the `window` nearest.

    The paper has layers of either kind: `weight` 1 is its linear attention and 0 its sliding window, so a policy with a rule for
    each layer gives its models; in between both are averaged. Its projections to 16 features for each head are the model's own:
    z is the logit of the queries and keys that the site has.
    """

    window: int = 64
    weight: float = 0.5
    eps: float = 1e-12

    paper: ClassVar[str] = "Arora et al. 2024, Simple linear attention language models: Based (arXiv:2402.18668)"
    exactness: ClassVar[str] = "another function than softmax, needs training"

    def __post_init__(self) -> None:
        whole_number(self, "window", least=1)
        for name, most in (("weight", 1.0), ("eps", float("inf"))):
            given: object = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= most:
                raise PolicyError(f"Based.{name} is {given!r}; it must be a number from 0 to {most:g}.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(6)),
            Example(cls(4, 1.0), queries=20),
            Example(cls(5, 0.25), causal=False),
            Example(cls(5, 0.0)),
            Example(cls(5), 1),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        what = "Based"
        found = [*linear.of_logits(site, what)]
        if self.weight and site.head_dim > WIDEST_TAYLOR:
            wide = features.taylor_width(site.head_dim)
            found.append(f"The head_dim is {site.head_dim}, which makes {wide} features; supported: up to {WIDEST_TAYLOR}.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, root = attend.site, (attend.site.scale or 1.0) ** 0.5
        if not self.weight:
            return attend(near_site(site, self.window), query, key, value)
        f, g = (features.taylor2(x * root, site.head_dim) for x in (query, key))
        far = linear.linear(f, g, value, linear.is_causal(site), None, True, self.eps)
        if self.weight == 1:
            return far
        return torch.lerp(attend(near_site(site, self.window), query, key, value), far, self.weight)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        near = site.queries * self.window if linear.is_causal(site) else site.queries * (2 * self.window - 1)
        taylor = linear.pairs(site, features.taylor_width(site.head_dim))
        return (taylor if self.weight else 0) + (near if self.weight != 1 else 0)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        kept, z = dense.seen(M, N, causal, keep, q.device), dense.scores(q, k, scale)
        behind = torch.arange(M, device=q.device)[:, None] + (N - M) - torch.arange(N, device=q.device)
        near = dense.mixed(dense.softmax(z, kept & (behind.abs() < self.window)), v)
        return self.weight * linear.mixed(1 + z + z**2 / 2, v, kept, True, self.eps) + (1 - self.weight) * near
