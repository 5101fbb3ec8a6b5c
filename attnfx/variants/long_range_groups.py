"""Groups of tokens at equal places of a coarse grid, across all views of an object: long-range grouping attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import dense, same_id
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class LongRangeGroups(Variant):
    """Tokens with the same (row mod s, column mod s), in whichever view, attend together; s is `group_num`.

    The sequence is `views` grids of `height` x `width` tokens, row after row, and before them `prefix` tokens (a class token)
    that make a group of their own. No convolution is added to the values, as the paper does with trained weights. Neighbouring
    tokens are in different groups, so that no tile is without pairs: the result is the paper's, but no time is saved.
    """

    views: int
    height: int = 14
    width: int = 14
    group_num: int = 7
    prefix: int = 0

    paper: ClassVar[str] = "Yang et al. 2023, Long-Range Grouping Transformer for Multi-View 3D Reconstruction (arXiv:2308.08724)"
    exactness: ClassVar[str] = "approximate, needs training"

    def __post_init__(self) -> None:
        for name in ("views", "height", "width", "group_num"):
            whole_number(self, name, least=1)
        whole_number(self, "prefix", least=0)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(3, 4, 6, group_num=2), queries=72, keys=72, causal=False),
            Example(cls(2, 5, 4, group_num=3, prefix=1), queries=41, keys=41, causal=False),
        )

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return same_id.objections(site, len(self._groups()), "grids")

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, ids = same_id.kept(attend.site, self._groups())
        return attend(site, query, key, value, more=[ids])

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        kept = torch.zeros(N, N, dtype=torch.bool, device=q.device)
        kept[: self.prefix, : self.prefix] = True
        grid = torch.arange(N - self.prefix, device=q.device).view(self.views, self.height, self.width) + self.prefix
        for row in range(self.group_num):
            for column in range(self.group_num):
                group = grid[:, row :: self.group_num, column :: self.group_num].flatten()
                kept[group[:, None], group] = True
        return dense.attention(q, k, v, scale, kept[N - M :] & dense.seen(M, N, causal, keep, q.device))

    def _groups(self) -> list[int]:
        s = self.group_num
        grid = [row % s * s + column % s for _ in range(self.views) for row in range(self.height) for column in range(self.width)]
        return [s * s] * self.prefix + grid
