"""HyperAttention: blocks of queries and keys that hash alike, and a few sampled keys for all the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, linear, partial, selection
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.base import Example, Variant, whole_number


@dataclass(frozen=True)
class HyperAttention(Variant):
    """Queries and keys are sorted by angular hashes, and block n of the sorted queries sees block n of the sorted keys. What is out
    of a query's block is estimated from `sample_size` keys, drawn once for all queries: those of them that are out of the block
    weigh N / `sample_size` times as much. One normaliser takes both.

    A hash is the side of each of `lsh_num_projs` random hyperplanes, in the order of a Gray code, so that neighbours differ in one
    of them. `seed` draws hyperplanes and samples. For full attention; the paper's causal form halves the sequence again and
    again. Nothing is estimated up to `block_size` keys.
    """

    block_size: int = 256
    sample_size: int = 256
    lsh_num_projs: int = 7
    seed: int = 0

    paper: ClassVar[str] = "Han et al. 2023, HyperAttention: Long-context Attention in Near-Linear Time (arXiv:2310.05869)"
    exactness: ClassVar[str] = "approximate and random, training-free"

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("sample_size", 1), ("lsh_num_projs", 1), ("seed", 0)):
            whole_number(self, name, least)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(8, 12), causal=False), Example(cls(5, 60, 3, seed=1), 41, 41, causal=False, key_heads=4),
            Example(cls(64, 4), causal=False),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        sizes = (site.queries, site.heads, site.key_heads)
        if not all(n.is_Integer for n in sizes):
            return (f"There are {site.queries} queries; samples are drawn of a number that is known.",)
        what = "HyperAttention"
        return (*linear.objections(site, what, causal=False), *linear.square(site, what))

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, n = attend.site, int(attend.site.keys)
        if n <= self.block_size:
            return attend(site, query, key, value)
        planes, places, samples = self._drawn(n, site.head_dim)
        orders = [self._order(x, planes, places) for x in (query, key)]
        ranks = [torch.argsort(order, -1) for order in orders]
        widths = site.head_dim, site.head_dim, site.value_dim
        sorted_q, sorted_k, sorted_v = (
            torch.gather(x, 2, torch.unsqueeze(order, -1).expand(-1, -1, -1, width))
            for x, order, width in zip((query, key, value), (orders[0], orders[1], orders[1]), widths, strict=True)
        )
        near, lse = attend.with_lse(self._near(site), sorted_q, sorted_k, sorted_v)
        near = torch.gather(near, 2, torch.unsqueeze(ranks[0], -1).expand(-1, -1, -1, site.value_dim))
        lse = torch.gather(lse, 2, ranks[0])
        blocks = [torch.div(rank, self.block_size, rounding_mode="floor") for rank in ranks]
        sampled = torch.index_select(blocks[1], 2, samples)
        keys, values = (torch.index_select(x, 2, samples) for x in (key, value))
        far, far_lse = attend.with_lse(self._far(site), query, keys, values, [blocks[0], sampled])
        far_lse = far_lse + math.log(n / self.sample_size)
        return partial.merged((far, far_lse), (near, lse), site)

    def _near(self, site: AttentionSite) -> AttentionSite:
        i, j = (expr.floordiv(expr.index(name), expr.integer(self.block_size)) for name in "ij")
        return site.replace(keep=expr.eq(i, j))

    def _far(self, site: AttentionSite) -> AttentionSite:
        """Sampled keys, whose blocks are the second side tensor more, for queries whose blocks are the first."""
        b, h, i, j = (expr.index(name) for name in "bhij")
        made, of_queries = beside(site, (site.batch, site.heads, site.queries), torch.int64)
        made, of_keys = beside(made, (site.batch, site.key_heads, self.sample_size), torch.int64)
        group = expr.integer(int(site.heads) // int(site.key_heads))
        own, other = read(of_queries, b, h, i, dtype=torch.int64), read(of_keys, b, expr.floordiv(h, group), j, dtype=torch.int64)
        return made.replace(keys=sympy.Integer(self.sample_size), keep=expr.ne(own, other), empty_rows="zero")

    def _order(self, x: Tensor, planes: Tensor, places: Tensor) -> Tensor:
        """Which token of (B, H, N, D) comes at each place, (B, H, N)."""
        bits = torch.gt(torch.matmul(selection.wide(x), planes), 0)
        code = torch.sum(bits * (2 ** torch.arange(self.lsh_num_projs)), -1)
        order: Tensor = torch.sort(torch.take(places, code), stable=True, dim=-1)[1]
        return order

    def _drawn(self, keys: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hyperplanes (D, P) float64, the place of each hash in the Gray code, and the numbers of the sampled keys."""
        generator = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(width, self.lsh_num_projs, generator=generator, dtype=torch.float64)
        samples = torch.randint(0, keys, (self.sample_size,), generator=generator)
        gray = [place ^ (place >> 1) for place in range(2**self.lsh_num_projs)]
        return planes, torch.tensor(gray).argsort(), samples

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(site.queries * (self.block_size + self.sample_size), super().pairs(site))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        N, k, v = k.shape[2], dense.grouped(k, q), dense.grouped(v, q)
        z = dense.scores(q, k, scale)
        if self.block_size >= N:
            return dense.mixed(z.softmax(-1), v)
        planes, _, samples = self._drawn(N, q.shape[3])
        gray = [place ^ (place >> 1) for place in range(2**self.lsh_num_projs)]

        def block_of(x: Tensor) -> Tensor:
            blocks = torch.empty(x.shape[:3], dtype=torch.int64)
            for b, h in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
                sides = (x[b, h].detach().double() @ planes > 0).long().tolist()
                place = [gray.index(sum(bit << n for n, bit in enumerate(bits))) for bits in sides]
                order = sorted(range(N), key=lambda token: (place[token], token))
                for rank, token in enumerate(order):
                    blocks[b, h, token] = rank // self.block_size
            return blocks

        alike = block_of(q)[..., :, None] == block_of(k)[..., None, :]
        times = torch.bincount(samples, minlength=N).to(z.dtype) * (N / self.sample_size)
        weights = (z - z.amax(-1, keepdim=True)).exp() * torch.where(alike, torch.ones_like(times), times)
        return torch.einsum("bhij,bhje->bhie", weights / weights.sum(-1, keepdim=True), v)
