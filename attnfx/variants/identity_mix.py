"""Attention mixed with the identity: what perturbed-attention guidance runs in its second branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant


@dataclass(frozen=True)
class IdentityMix(Variant):
    """The weights A become (1 - u) A + u I in the given heads, so the output becomes (1 - u) O + u V.

    `u` between 0 and 1: 1 is perturbed-attention guidance, where a token sees itself alone. `heads`: their numbers; none is all.
    """

    u: float = 1.0
    heads: tuple[int, ...] = ()

    paper: ClassVar[str] = "Fine-Grained Perturbation Guidance via Attention Head Selection: HeadHunter, SoftPAG (arXiv:2506.10978)"
    exactness: ClassVar[str] = "a perturbation, training-free"

    def __post_init__(self) -> None:
        given: object = self.u
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
            raise PolicyError(f"IdentityMix.u is {given!r}; it must be a number from 0 to 1.")
        if any(isinstance(h, bool) or not isinstance(h, int) or h < 0 for h in self.heads):
            raise PolicyError(f"IdentityMix.heads is {self.heads!r}; it must be whole numbers from 0 on.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example(cls(0.25, heads=(0, 3))), Example(cls(0.5)), Example(cls(0.25), causal=False, queries=41, keys=41)

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = []
        if site.queries != site.keys:
            found.append(
                f"There are {site.queries} queries and {site.keys} keys; the identity needs as many of one as of the other."
            )
        if not site.heads.is_Integer or any(h >= site.heads for h in self.heads):
            found.append(f"The heads are {self.heads}; the site has {site.heads}.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site = attend.site
        by = torch.tensor(self._mix(int(site.heads)), dtype=site.dtype)[:, None, None]  # (H, 1, 1)
        own = torch.repeat_interleave(value, int(site.heads) // int(site.key_heads), 1)
        return torch.lerp(attend(site, query, key, value), own, by)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        A = dense.softmax(dense.scores(q, k, scale), dense.seen(M, N, causal, keep, q.device))
        u = torch.tensor(self._mix(q.shape[1]), dtype=q.dtype, device=q.device)[:, None, None]
        return dense.mixed((1 - u) * A + u * torch.eye(N, dtype=q.dtype, device=q.device), v)

    def _mix(self, heads: int) -> list[float]:
        return [self.u if not self.heads or h in self.heads else 0.0 for h in range(heads)]
