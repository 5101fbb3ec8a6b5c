"""Softmax near the query and its second-order Taylor polynomial far away, under one normaliser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor
from torch.nn import functional

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, features, linear, positions
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number
from attnfx.variants.linear_attention import WIDEST_TAYLOR


@dataclass(frozen=True)
class TaylorWindow(Variant):
    """Weights exp(z) for the `window` keys up to the query's own, 1 + z + z^2 / 2 for all keys before; one sum divides both.

    With O_n and the log-sum-exp L of the window, O_f and the sum S of the rest, O = (e^L O_n + S O_f) / (e^L + S). The rest is
    linear attention on keys and values moved `window` tokens on, so nothing is added to be subtracted again. Of full attention,
    the window reaches as far to both sides, and the rest is two of them, the second on the sequence turned round.
    """

    window: int = 64

    paper: ClassVar[str] = (
        "Based, second-order Taylor features and a window (arXiv:2402.18668), under one normaliser as in LoLCATs (arXiv:2410.10254)"
    )
    exactness: ClassVar[str] = "another function than softmax far from the query; close to it only where those logits are small"

    def __post_init__(self) -> None:
        whole_number(self, "window", least=1)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(6)), Example(cls(4), queries=20), Example(cls(5), causal=False), Example(cls(100)), Example(cls(1), 1)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        what = "the Taylor polynomial"
        found = [*linear.of_logits(site, what)]
        if site.head_dim > WIDEST_TAYLOR:
            wide = features.taylor_width(site.head_dim)
            found.append(f"The head_dim is {site.head_dim}, which makes {wide} features; supported: up to {WIDEST_TAYLOR}.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, root = attend.site, (attend.site.scale or 1.0) ** 0.5
        near, lse = attend.with_lse(near_site(site, self.window), query, key, value)
        f, g = (features.taylor2(x * root, site.head_dim) for x in (query, key))
        far, sums = self._far(f, g, value)
        if not linear.is_causal(site):
            back, back_sums = self._far(*(torch.flip(x, (2,)) for x in (f, g, value)))
            far, sums = far + torch.flip(back, (2,)), sums + torch.flip(back_sums, (2,))
        some = sums > 0
        sums = torch.where(some, sums, torch.ones_like(sums))  # no logarithm of zero, whose gradient would be NaN
        share = torch.where(some, torch.sigmoid(torch.log(sums) - lse), torch.zeros_like(sums))[..., None]
        out = near * (1 - share) + far / sums[..., None] * share
        return torch.ops.aten.to.dtype(out, site.dtype)  # type: ignore[no-any-return]

    def _far(self, f: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j w v (B,H,M,DV) and sum_j w (B,H,M) over the keys at least a window before the query, wide."""
        g, v = (functional.pad(x, (0, 0, self.window, 0)) for x in (g, v))
        made = torch.ops.attnfx.linear_attention_states.default(
            f, g[:, :, : -self.window], v[:, :, : -self.window], None, True, True, TINY
        )
        return made[0] * made[1][..., None], made[1]

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        sides = 1 if linear.is_causal(site) else 2
        return sides * (site.queries * self.window + linear.pairs(site, features.taylor_width(site.head_dim)))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        z = dense.scores(q, k, scale)
        behind = torch.arange(M, device=q.device)[:, None] + (N - M) - torch.arange(N, device=q.device)
        w = torch.where(behind.abs() < self.window, z.exp(), 1 + z + z**2 / 2)
        return linear.mixed(w, v, dense.seen(M, N, causal, keep, q.device), normalize=True)


#: What keeps a sum of no weights from dividing zero by zero.
TINY = 1e-30


def near_site(site: AttentionSite, window: int) -> AttentionSite:
    """``site`` with the keys that are fewer than ``window`` tokens away."""
    distance = positions.position(site) - expr.index("j")
    near = [expr.le(distance, expr.integer(window - 1))]
    if not site.facts.delta_low:
        near.append(expr.le(-distance, expr.integer(window - 1)))
    return site.replace(keep=expr.logical_and(site.keep, *near))
