"""Attention inside of groups of tokens, shifted by half a group in half of the heads: LongLoRA's S2-Attn and SinkLoRA's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import dense, head_tables, positions
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class ShiftedGroups(Variant):
    """The first half of the heads attends inside of groups [0, g), [g, 2g), ..., the others inside of [0, g/2), [g/2, 3g/2), ...

    g is `group_size`, or without one N / `groups` of the N keys, where that is an even number. Nothing wraps around from the
    end of the sequence to its start: the last, or first, half group is on its own. The first `sinks` keys are seen by all, as
    in SinkLoRA. The model's own mask, causal or not, still holds. A training technique: the trained model attends to
    everything.
    """

    groups: int = 4
    group_size: int | None = None
    sinks: int = 0

    paper: ClassVar[str] = "Chen et al. 2024, LongLoRA (arXiv:2309.12307); sinks: Zhang 2024, SinkLoRA (arXiv:2406.05678)"
    exactness: ClassVar[str] = "approximate, for fine-tuning"

    def __post_init__(self) -> None:
        whole_number(self, "groups", least=1)
        whole_number(self, "sinks", least=0)
        if self.group_size is not None:
            whole_number(self, "group_size", least=2)
            if self.group_size % 2:
                raise PolicyError(f"ShiftedGroups.group_size is {self.group_size}; it must be an even number.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(group_size=8)), Example(cls(), queries=40, keys=40), Example(cls(group_size=6, sinks=2)),
            Example(cls(group_size=10), causal=False), Example(cls(group_size=8, sinks=1), queries=13),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*positions.objections(site, "a group")]
        if not site.heads.is_Integer:
            found.append(f"The number of heads is {site.heads}; half of them are shifted where it is known.")
        if self.group_size is None and not (site.keys.is_Integer and int(site.keys) % (2 * self.groups) == 0):
            found.append(f"{site.keys} keys are not {self.groups} groups of an even size; give `group_size`.")
        return tuple(found)

    def apply(self, site: AttentionSite) -> AttentionSite:
        g = self._size(site.keys)
        at, j = positions.position(site), expr.index("j")
        straight, shifted = (expr.eq(*(expr.floordiv(x + s, expr.integer(g)) for x in (at, j))) for s in (0, g // 2))
        first = head_tables.of_heads(range(int(site.heads) // 2))
        sink = expr.le(j, expr.integer(self.sinks - 1))
        own = expr.logical_or(expr.logical_not(first), straight, sink), expr.logical_or(first, shifted, sink)
        near = positions.window(site, g, self.sinks)  # follows from the groups, and has a closed form for all heads
        return site.replace(keep=expr.logical_and(site.keep, near, *own))

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        g = site.keys / self.groups if self.group_size is None else sympy.Integer(self.group_size)
        inside = (g + 1) / 2 if site.facts.causal else g
        return sympy.Min(site.queries * (inside + self.sinks), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        H, M, N = q.shape[1], q.shape[2], k.shape[2]
        g = self._size(N)
        kept = dense.seen(M, N, False, None, q.device)[None].repeat(H, 1, 1)
        for h in range(H):
            starts = {0, *range(0 if h < H // 2 else g // 2, N, g)}
            for start, end in zip(sorted(starts), [*sorted(starts - {0}), N], strict=True):
                rows = slice(max(0, start - (N - M)), max(0, end - (N - M)))
                kept[h, rows, :start] = kept[h, rows, end:] = False
        kept[:, :, : self.sinks] = True
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))

    def _size(self, keys: int | sympy.Expr) -> int:
        return int(keys) // self.groups if self.group_size is None else self.group_size
