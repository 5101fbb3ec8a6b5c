"""Visual attention redistribution: what sinks lose goes to the other tokens of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite
from attnfx.variants import column_sums, dense, linear, summaries
from attnfx.variants.attend import Attend, Within, beside, read
from attnfx.variants.base import Example, Variant

#: What a key is: neither a sink nor of the image, of the image, a sink of the image, another sink.
OTHER, VISUAL, VISUAL_SINK, OTHER_SINK = range(4)


@dataclass(frozen=True)
class SinkRedistribution(Variant):
    """In heads and rows that look at the image, sinks keep `p` of their probabilities, and the rest goes to the image's other
    tokens, in proportion.

    The keys from `visual[0]` up to, without it, `visual[1]` are the image. A row of a text token looks at it where the image has at
    least `mass` of its attention, of which sinks have no more than `rho`. `sinks` are the numbers of sink tokens, of the
    image or before it. If none are given they are found: keys to which the image's own queries that see them give more than
    `threshold` on average, over all heads. (The paper finds them in two dimensions of the hidden states, which an attention
    does not show.) A decode step needs them given.
    """

    visual: tuple[int, int]
    sinks: tuple[int, ...] = ()
    p: float = 0.6
    rho: float = 0.5
    mass: float = 0.2
    threshold: float = 0.05

    paper: ClassVar[str] = (
        "Kang et al. 2025, See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv:2503.03321), VAR"
    )
    exactness: ClassVar[str] = "changes the function, training-free"

    def __post_init__(self) -> None:
        name = "SinkRedistribution"
        if not _whole(self.visual) or len(self.visual) != 2 or not self.visual[0] < self.visual[1]:
            raise PolicyError(
                f"{name}.visual is {self.visual!r}; it must be the first key of the image and the one behind its last."
            )
        if not _whole(self.sinks) or any(j >= self.visual[1] for j in self.sinks):
            raise PolicyError(f"{name}.sinks is {self.sinks!r}; it must be keys of the image or before it.")
        for field, most in (("p", 1.0), ("rho", 0.99), ("mass", 1.0), ("threshold", 1.0)):
            given: object = getattr(self, field)
            least = 0.01 if field == "mass" else 0.0
            if isinstance(given, bool) or not isinstance(given, int | float) or not least <= given <= most:
                raise PolicyError(f"{name}.{field} is {given!r}; it must be a number from {least:g} to {most:g}.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls((4, 20), (0, 6, 11))), Example(cls((3, 17), threshold=0.12)),
            Example(cls((1, 30), (2, 3), 0.25), queries=13), Example(cls((1, 30), (0, 9)), queries=1),
            Example(cls((5, 21), p=0.5, rho=0.7, threshold=0.1), queries=34, keys=37, key_heads=4),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*summaries.known(site, "SinkRedistribution"), *linear.objections(site, "redistribution", causal=True)]
        if found:
            return tuple(found)
        (start, end), ahead = self.visual, int(site.keys - site.queries)
        if end > site.keys:
            found.append(f"The image is the keys from {start} to {end}; the site has {site.keys} keys.")
        elif not self.sinks and start < ahead:
            found.append(f"The first {ahead} keys are from before this call, and sinks are found by the queries from {start} on.")
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, (start, end) = attend.site, self.visual
        if self.sinks:
            one = torch.tensor([[j in self.sinks for j in range(int(site.keys))]])
            sinks = torch.logical_or(one, attend.zeros(attend.number(site.batch), 1, dtype=torch.bool))
        else:
            sinks = self._found(attend, query, key)
        at = attend.arange(int(site.keys))
        image = torch.logical_and(torch.ge(at, start), torch.lt(at, end))
        kinds = torch.where(image, torch.where(sinks, VISUAL_SINK, VISUAL), torch.where(sinks, OTHER_SINK, OTHER))
        parts = [attend.with_lse(_part(site, kind), query, key, value, [kinds]) for kind in range(4)]
        masses = torch.softmax(torch.stack([lse for _, lse in parts], -1), -1)
        weights = self._redistributed(masses, torch.unsqueeze(self._of_text(attend), 1))
        outputs = torch.stack([out for out, _ in parts], -1)
        mixed = torch.sum(outputs * torch.unsqueeze(weights, 3), -1)
        return torch.ops.aten.to.dtype(mixed, site.dtype)  # type: ignore[no-any-return]

    def _found(self, attend: Attend, query: Tensor, key: Tensor) -> Tensor:
        """Which keys (B, N) are sinks, by the queries of the image."""
        site, (start, end) = attend.site, self.visual
        first, count = start - int(site.keys - site.queries), end - start
        keep = expr.le(expr.index("j"), expr.index("i") + expr.integer(start))
        own = site.replace(queries=sympy.Integer(count), keys=sympy.Integer(end), keep=keep)
        sums = column_sums.of_runs(Within(attend, own), query[:, :, first : first + count], key[:, :, :end], count)[..., 0]
        seen = torch.sub(count, torch.clamp(torch.sub(attend.arange(end), start), min=0))
        return pad(torch.gt(torch.mean(sums, 1), torch.mul(seen, self.threshold)), (0, int(site.keys) - end))

    def _of_text(self, attend: Attend) -> Tensor:
        """Which queries (M,) are not of the image."""
        site, (start, end) = attend.site, self.visual
        at = torch.add(attend.arange(int(site.queries)), int(site.keys - site.queries))
        return torch.logical_or(torch.lt(at, start), torch.ge(at, end))

    def _redistributed(self, masses: Tensor, text: Tensor) -> Tensor:
        """The masses (..., M, 4) of the kinds after the redistribution; ``text`` is (M, 1)."""
        other, visual, visual_sink, other_sink = torch.split(masses, 1, -1)
        image = visual + visual_sink
        looks = torch.logical_and(torch.ge(image, self.mass), torch.le(visual_sink, self.rho * image))
        freed = torch.where(torch.logical_and(looks, text), masses, torch.zeros_like(masses)) * (1 - self.p)
        of_image, of_others = freed[..., VISUAL_SINK : VISUAL_SINK + 1], freed[..., OTHER_SINK : OTHER_SINK + 1]
        return torch.cat([other, visual + of_image + of_others, visual_sink - of_image, other_sink - of_others], -1)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        image = self.visual[1] - self.visual[0]
        return super().pairs(site) + (0 if self.sinks else 2 * image * (self.visual[0] + image / 2))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N, (start, end) = q.shape[2], k.shape[2], self.visual
        A = dense.softmax(dense.scores(q, k, scale), dense.seen(M, N, causal, keep, q.device))
        rows = slice(start - (N - M), end - (N - M))
        sinks = torch.zeros(len(q), N, dtype=torch.bool)
        if self.sinks:
            sinks[:, list(self.sinks)] = True
        else:
            visible = dense.seen(M, N, True, None, q.device)[rows].sum(0).clamp(min=1)
            sinks = A[:, :, rows].detach().sum(2).mean(1) / visible > self.threshold
        sinks = sinks[:, None, None]
        image = (torch.arange(N) >= start) & (torch.arange(N) < end)
        of_image, of_its_sinks, of_sinks = ((A * kind).sum(-1, keepdim=True) for kind in (image, image & sinks, sinks))
        text = torch.ones(M, 1, dtype=torch.bool)
        text[max(rows.start, 0) : max(rows.stop, 0)] = False
        looks = text & (of_image >= self.mass) & (of_its_sinks <= self.rho * of_image)
        more = 1 + (1 - self.p) * of_sinks / torch.where(looks, of_image - of_its_sinks, 1)
        changed = torch.where(sinks, self.p * A, torch.where(image, more * A, A))
        return dense.mixed(torch.where(looks, changed, A), v)


def _part(site: AttentionSite, kind: int) -> AttentionSite:
    """The attention to keys of one kind."""
    made, slot = beside(site, (site.batch, site.keys), torch.int64)
    own = expr.eq(read(slot, expr.index("b"), expr.index("j"), dtype=torch.int64), expr.integer(kind))
    return made.replace(keep=expr.logical_and(site.keep, own), empty_rows="zero")


def _whole(numbers: object) -> bool:
    return isinstance(numbers, tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
