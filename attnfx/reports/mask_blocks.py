"""What a mask is in a grid of blocks, for pictures: full, partial, empty, or known only with the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of, integer
from attnfx.algebra.intervals import enclose
from attnfx.algebra.tiling import Tiling, kinds
from attnfx.expr import Expr, Load
from attnfx.site import AttentionSite

EMPTY, PARTIAL, FULL, DATA = range(4)
#: Blocks along the longer side of a picture.
BLOCKS = 32
#: Blocks up to this many pairs, all together, are looked into where intervals leave them undecided.
_PAIRS = 1 << 22
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Blocks:
    """``kinds[row][column]`` of blocks of ``rows`` queries and ``columns`` keys, in an attention of ``queries`` and ``keys``;
    ``head``: of which head, where the mask depends on it."""

    kinds: tuple[tuple[int, ...], ...]
    rows: int
    columns: int
    queries: int
    keys: int
    head: int | None = None

    def share(self, kind: int) -> float:
        """How much of the grid is of a kind."""
        flat = [k for line in self.kinds for k in line]
        return flat.count(kind) / len(flat)


def sample_sizes(site: AttentionSite, length: int = 512) -> dict[sympy.Symbol, int]:
    """A number for each size that changes: ``length`` for those of queries and keys, as far as their ranges allow, else 2."""
    lengths = sympy.sympify(site.queries).free_symbols | sympy.sympify(site.keys).free_symbols
    found = {}
    for symbol in sorted(lengths | {*site.symbols} | sympy.sympify(site.batch).free_symbols, key=str):
        low, high = (_number(known.get(symbol)) for known in (site.ranges.low, site.ranges.high))
        wanted = length if symbol in lengths else 2
        found[symbol] = max(wanted if high is None else min(wanted, high), 1 if low is None else low)
    return found


def blocks(site: AttentionSite, count: int = BLOCKS) -> Blocks | None:
    """The picture's blocks, ``count`` along the longer side; None where a size cannot be computed."""
    sizes = sample_sizes(site)
    try:
        queries, keys = (int(integer(sympy.sympify(n), sizes)) for n in (site.queries, site.keys))
    except (KeyError, TypeError, ValueError):
        return None
    if queries < 1 or keys < 1:
        return None
    step = max(1, -(-max(queries, keys) // count))
    terms = _terms(site.keep)
    known = expr.logical_and(*(t for t in terms if not _reads(t)))
    tiling = Tiling(1, 1, queries, keys, step, step)
    must, may = (t[0, 0] for t in kinds(enclose(known), tiling, (), sizes, _CPU))
    kind = torch.where(must, FULL, torch.where(may, PARTIAL, EMPTY))
    _looked_into(known, kind, queries, keys, step, sizes)
    if any(_reads(t) for t in terms):
        kind = torch.where(kind == EMPTY, EMPTY, DATA)
    head = 0 if expr.depends_on(site.keep, "h") else None
    return Blocks(tuple(tuple(line) for line in kind.tolist()), step, step, queries, keys, head)


def _looked_into(keep: Expr, kind: Tensor, queries: int, keys: int, step: int, sizes: Mapping[sympy.Symbol, int]) -> None:
    """Decide, element by element, blocks that intervals left undecided, as long as they are few."""
    open_blocks = (kind == PARTIAL).nonzero().tolist()
    if len(open_blocks) * step * step > _PAIRS:
        return
    for r, c in open_blocks:
        rows, columns = (range(at * step, min((at + 1) * step, n)) for at, n in ((r, queries), (c, keys)))
        held = evaluate(keep, grid_of(1, 1, rows, columns, _CPU), (), sizes).expand(1, 1, len(rows), len(columns))
        kind[r, c] = FULL if bool(held.all()) else PARTIAL if bool(held.any()) else EMPTY


def _terms(keep: Expr) -> tuple[Expr, ...]:
    return keep.args if isinstance(keep, expr.Call) and keep.op == "and" else (keep,)


def _reads(e: Expr) -> bool:
    return any(isinstance(n, Load) for n in expr.walk(e))


def _number(n: object) -> int | None:
    found = None if n is None else sympy.sympify(n)
    return int(found) if found is not None and found.is_Integer else None
