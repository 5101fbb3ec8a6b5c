"""Attention between given blocks of queries and keys, or between those of a butterfly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, positions
from attnfx.variants.attend import Attend, beside, read
from attnfx.variants.base import Example, Variant, whole_number

#: The most runs of neighbouring blocks that a row of blocks may have: each is a term of the mask.
RUNS = 32
#: The first and the last block of a run.
Run = tuple[int, int]


@dataclass(frozen=True)
class BlockSparse(Variant):
    """Key block J = j // block is kept for the queries at places of block I where the table of blocks has a 1 at (I, J).

    `blocks` is rows of 0 and 1 for all heads; or such a table for each query head, or for each key head and its group; or the
    path of a file with one (JSON, or a tensor saved by torch); or "butterfly": I and J are equal, or differ in one bit, log2(N
    / block) + 1 blocks a row. The model's own mask holds within blocks. Each row is kept as up to 32 runs of neighbouring
    blocks, whose ends are what a kernel reads: tiles without a kept block are skipped.
    """

    blocks: Any
    block: int = 128

    paper: ClassVar[str] = (
        "Dao et al. 2022, FlashAttention, block-sparse (arXiv:2205.14135); butterfly: Chen et al. 2022, Pixelated Butterfly "
        "(arXiv:2112.00029)"
    )
    exactness: ClassVar[str] = "approximate, needs training or calibrated blocks"

    def __post_init__(self) -> None:
        whole_number(self, "block", least=1)
        if isinstance(self.blocks, tuple):
            _table(self.blocks)
        elif not isinstance(self.blocks, str) or not self.blocks:
            raise PolicyError(f'BlockSparse.blocks is {self.blocks!r}; it must be rows of 0 and 1, a path, or "butterfly".')

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        one = ((1, 0, 0, 1), (0, 1, 0, 0), (1, 0, 1, 0), (1, 1, 0, 1))
        other = ((1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 1, 0), (1, 0, 1, 1))
        return (
            Example(cls(one, block=10)), Example(cls("butterfly", block=5)), Example(cls((one, other, other, one), block=10)),
            Example(cls((other, one, one, one), block=10), causal=False), Example(cls("butterfly", block=4), causal=False),
            Example(cls(one, block=10), queries=13), Example(cls("butterfly", block=6), queries=1),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        if not all(n.is_Integer for n in (site.heads, site.key_heads, site.keys)):
            return (
                f"{site.heads} heads, {site.key_heads} key heads or {site.keys} keys are not known; blocks are of known numbers.",
            )
        try:
            table = self._blocks(int(site.keys))
        except PolicyError as error:
            return (str(error),)
        found, wanted = tuple(table.shape), -(-int(site.keys) // self.block)
        if found[1:] != (wanted, wanted) or found[0] not in (1, site.heads, site.key_heads):
            return (
                f"The blocks are {found[0]} tables of {found[1]} x {found[2]}; the site has {site.heads} heads, {site.key_heads} "
                f"key heads and {wanted} x {wanted} blocks of {self.block}.",
            )
        seen = table.tril() if site.facts.causal else table
        if not bool(seen.any(-1).all()):
            return ("There is a row of blocks without one that its queries see; each must have some.",)
        if (runs := max(map(len, _runs(table)))) > RUNS:
            return (f"A row of blocks has {runs} runs of neighbouring blocks; up to {RUNS} are supported.",)
        return positions.objections(site, "a block")

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        table = self._blocks(int(attend.site.keys))
        count, rows, _ = table.shape
        runs = _runs(table)
        most = max(map(len, runs))
        ends = torch.tensor([row for n in range(count) for row in _aligned(runs[n * rows : (n + 1) * rows], most)])
        ends = ends.view(count, rows, most, 2)
        site, slot = beside(attend.site, ends.shape, torch.int64)
        group = int(site.heads) // count
        head = expr.floordiv(expr.index("h"), expr.integer(group)) if count > 1 else expr.integer(0)
        row, column = (expr.floordiv(x, expr.integer(self.block)) for x in (positions.position(site), expr.index("j")))

        def end(run: int, side: int) -> Expr:
            return read(slot, head, row, expr.integer(run), expr.integer(side), dtype=torch.int64)

        kept = [expr.logical_and(expr.le(end(r, 0), column), expr.le(column, end(r, 1))) for r in range(most)]
        if bool(table.diagonal(dim1=1, dim2=2).all()):
            kept.append(expr.eq(row, column))  # says nothing new, but proves that each query keeps its own key
        return attend(site.replace(keep=expr.logical_and(site.keep, expr.logical_or(*kept))), query, key, value, more=[ends])

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        """The part of the blocks that a causal mask leaves."""
        table = self._blocks(int(site.keys))
        seen = table.tril() if site.facts.causal else table
        whole = torch.ones_like(table).tril() if site.facts.causal else torch.ones_like(table)
        return super().pairs(site) * sympy.Rational(int(seen.sum()), int(whole.sum()))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        table = self._blocks(N).to(q.device)
        spread = table.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)[:, N - M : N, :N]
        kept = spread.repeat_interleave(q.shape[1] // spread.shape[0], 0)
        return dense.attention(q, k, v, scale, kept & dense.seen(M, N, causal, keep, q.device))

    def _blocks(self, keys: int) -> Tensor:
        """Tables of blocks, (1 or heads, rows, columns), bool."""
        if self.blocks == "butterfly":
            at = torch.arange(-(-keys // self.block))
            apart = at[:, None] ^ at
            return ((apart & (apart - 1)) == 0)[None]
        return _table(_read(self.blocks) if isinstance(self.blocks, str) else self.blocks)


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text()) if Path(path).suffix == ".json" else torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise PolicyError(f'No blocks can be read from "{path}": {type(error).__name__}: {error}') from error


def _table(blocks: Any) -> Tensor:
    try:
        given = torch.as_tensor(blocks)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"The blocks are no table: {error}") from error
    if given.dim() not in (2, 3) or given.numel() == 0 or not bool(((given == 0) | (given == 1)).all()):
        raise PolicyError(
            f"The blocks have the shape {tuple(given.shape)}; they must be one table of 0 and 1, or one for each head."
        )
    return given.bool().reshape(-1, *given.shape[-2:])


def _runs(table: Tensor) -> list[list[Run]]:
    """The runs of kept blocks of all rows of all tables."""
    found = []
    for row in table.flatten(0, 1).tolist():
        spans = [(kept, [at for at, _ in run]) for kept, run in groupby(enumerate(row), key=lambda pair: pair[1])]
        found.append([(ats[0], ats[-1]) for kept, ats in spans if kept])
    return found


def _aligned(rows: list[list[Run]], most: int) -> list[list[Run]]:
    """Each row of one table with ``most`` runs, some of them empty, each as near as may be to the one at its place in the row
    before: a tile of several rows is judged by the least and the largest ends of all runs at one place."""
    before, found = [(0, -1)] * most, []
    for row in rows:
        apart = sorted((abs(a - c), r, at) for r, (a, _) in enumerate(row) for at, (c, _) in enumerate(before))
        placed: dict[int, int] = {}
        for _, r, at in apart:
            if at not in placed and r not in placed.values():
                placed[at] = r
        before = [row[placed[at]] if at in placed else (before[at][0], before[at][0] - 1) for at in range(most)]
        found.append(before)
    return found
