"""Blocks of keys chosen for blocks of queries: a boolean table (B, H, blocks of queries, blocks of keys) that the mask reads.

Under a causal mask nothing of the future takes part in a choice. A block of queries chooses by queries that are not after its first
one, among the blocks of keys that are complete at the first one's position. The others that it reaches, which hold the positions
of its own queries, are kept without choosing. Indices are constants to gradients, since none flow through a choice.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx import expr
from attnfx.algebra.integers import FloorDiv
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Const, Expr, Int, Score
from attnfx.site import AttentionSite
from attnfx.variants import standing as places
from attnfx.variants.attend import Attend, beside, read


def objections(site: AttentionSite, growing: bool = False) -> tuple[str, ...]:
    """Why blocks cannot be chosen. ``growing``: for a single query they can among keys whose number changes."""
    M, N = site.queries, site.keys
    if direction(site.score) <= 0:
        return (f"The scores are {site.score}, not proved to grow with q.k; blocks are chosen for the largest products.",)
    known = (site.heads, site.key_heads, M, *(() if growing and M == 1 else (N,)))
    if not all(n.is_Integer for n in known):
        return (f"There are {M} queries and {N} keys; blocks are chosen among numbers known when the graph is compiled.",)
    if site.facts.delta_low:
        if site.facts.delta_low == (M - N,) and N >= M:
            return ()
        return (f"The mask is {site.keep}; blocks are chosen under a causal mask whose last query stands at the last key.",)
    if site.facts.full or places.last_key(site) is not None:
        return ()
    return (f"The mask is {site.keep}, and is not causal: blocks that are chosen might hold no key that it keeps.",)


def direction(score: Expr) -> int:
    """1 where a score program is proved never to fall as q.k grows, -1 never to rise, else 0."""
    if not isinstance(score, Call):
        return int(isinstance(score, Score))
    inside = [n for n, x in enumerate(score.args) if has_score(x)]
    if len(inside) != 1:
        return 0
    at, found = inside[0], direction(score.args[inside[0]])
    if score.op in ("cast", "tanh", "exp", "sigmoid", "add", "min", "max") or (score.op == "where" and at > 0):
        return found
    if score.op in ("neg", "sub"):
        return found if score.op == "sub" and at == 0 else -found
    factor = score.args[1 - at] if score.op == "mul" or (score.op == "div" and at == 0) else None
    if isinstance(factor, Const | Int) and (isinstance(factor, Const) or factor.value.is_number):
        return found * ((factor.value > 0) - (factor.value < 0))
    return 0


def ordered(site: AttentionSite) -> bool:
    """Whether queries stand among the keys: under a causal mask, and a single query, which stands at the last key."""
    return bool(site.facts.delta_low) or site.queries == 1


def blocks(length: sympy.Expr, size: int) -> int:
    """How many blocks there are."""
    return -(-int(length) // size)


def counted(attend: Attend, length: sympy.Expr, size: int) -> int:
    """How many blocks there are, of a length that may change."""
    return attend.number(FloorDiv(length + size - 1, sympy.Integer(size)))


def pooled(attend: Attend, x: Tensor, length: sympy.Expr, size: int) -> Tensor:
    """The means of blocks of ``size`` rows of x (B, H, length, D), (B, H, blocks, D); the last block may have fewer rows."""
    number, count = counted(attend, length, size), attend.number(length)
    sums = torch.sum(torch.unflatten(pad(x, (0, 0, 0, number * size - count)), 2, (-1, size)), 3)
    rows = torch.clamp(torch.add(torch.mul(attend.arange(number), -size), count), max=size)
    return torch.div(sums, torch.unsqueeze(rows, 1))


def led(x: Tensor, length: sympy.Expr, size: int) -> Tensor:
    """For each block of ``size`` rows the mean of the ``size`` rows up to and with its first, as far as there are so many."""
    number = blocks(length, size)
    before = pad(x, (0, 0, size - 1, number * size - (size - 1) - int(length))) if size > 1 else x
    sums = torch.sum(torch.unflatten(before, 2, (number, size)), 3)
    rows = torch.full((number, 1), float(size))
    rows[0] = 1
    return torch.div(sums, rows)


def of_queries(attend: Attend, query: Tensor, size: int) -> Tensor:
    """A mean query (B, H, I, D) for each block of ``size``: none after its first one where queries stand among keys."""
    length, x = attend.site.queries, wide(query, attend.site.dtype)
    return led(x, length, size) if ordered(attend.site) else pooled(attend, x, length, size)


def wide(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without a gradient, and so wide that a choice does not hang on how sums are rounded: float32 of a half precision ``dtype``,
    whose numbers are rounded far more coarsely, else float64."""
    wider = torch.float32 if dtype.itemsize == 2 else torch.float64
    return torch.ops.aten._to_copy.default(torch.detach(x), dtype=wider)  # type: ignore[no-any-return]


def chosen(attend: Attend, scores: Tensor, top: int, size: tuple[int, int], sinks: int = 0, local: int = 0) -> Tensor:
    """The table (B, H, I, J) from scores of blocks: the ``top`` best of those complete at the block's first query, those of the
    first ``sinks`` keys, those of the last ``local`` keys before it, and those that its own queries stand in."""
    complete, always = standing(attend, size, sinks, local)
    scores = torch.masked_fill(scores, torch.logical_not(complete), float("-inf"))
    number = counted(attend, attend.site.keys, size[1])
    if not isinstance(number, int):  # perhaps fewer blocks than are to be chosen
        scores = pad(scores, (0, top), value=float("-inf"))
    where = torch.ops.aten.topk.default(scores, min(top, number) if isinstance(number, int) else top)[1]
    picked = torch.scatter(torch.zeros_like(scores, dtype=torch.bool), 3, where, True)[..., :number]
    return torch.logical_or(torch.logical_and(picked, complete), always)


def standing(attend: Attend, size: tuple[int, int], sinks: int, local: int) -> tuple[Tensor, Tensor]:
    """Of blocks of keys, for blocks of queries (I or 1, J), or of each sequence (B, 1, 1, J): which may be chosen, a run from the
    first key on of those complete at the block's first query; and which are kept without a choice."""
    site, (rows, columns) = attend.site, size
    first_key = torch.mul(attend.arange(counted(attend, site.keys, columns)), columns)
    always = torch.unsqueeze(torch.lt(first_key, sinks), 0)
    if not ordered(site):
        return torch.ones_like(always), always
    last_key, place = torch.add(first_key, columns - 1), places.last_key(site)
    if place is not None:
        assert isinstance(place.slot, int)
        at = torch.reshape(attend.loads[place.slot], (-1, 1, 1, 1))
    else:
        first_query = torch.mul(attend.arange(blocks(site.queries, rows)), rows)
        at = torch.unsqueeze(torch.add(first_query, attend.number(site.keys - site.queries)), 1)
    near = torch.logical_and(torch.gt(last_key, torch.sub(at, local)), torch.le(first_key, at + (rows - 1)))
    return torch.le(last_key, at), torch.logical_or(always, near)


def masked(site: AttentionSite, size: tuple[int, int]) -> AttentionSite:
    """``site`` whose mask reads a table in blocks of ``size``, one more side tensor than it had."""
    rows, columns = size
    keys = FloorDiv(site.keys + columns - 1, sympy.Integer(columns))
    shape = (site.batch, site.heads, blocks(site.queries, rows), keys)
    made, slot = beside(site, shape, torch.bool)
    b, h, i, j = (expr.index(name) for name in "bhij")
    table = read(slot, b, h, expr.floordiv(i, expr.integer(rows)), expr.floordiv(j, expr.integer(columns)), dtype=torch.bool)
    return made.replace(keep=expr.logical_and(site.keep, table))


def opened(table: Tensor, size: tuple[int, int], queries: int, keys: int) -> Tensor:
    """A table for every pair, (B, H, M, N), for an oracle."""
    return table.repeat_interleave(size[0], 2)[:, :, :queries].repeat_interleave(size[1], 3)[..., :keys]


def stated(score: Tensor, complete: list[int], always: list[bool], top: int) -> Tensor:
    """For an oracle: of one block of queries, which blocks are kept (B, H, J), from scores (B, H, J)."""
    kept = torch.tensor(always, device=score.device).expand(score.shape).clone()
    for rank in range(min(top, len(complete))):
        order = score[..., complete].argsort(-1, descending=True)[..., rank]
        kept.scatter_(-1, torch.tensor(complete, device=score.device)[order][..., None], True)
    return kept
