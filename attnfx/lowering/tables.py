"""What a plan changes in a score program: parts of it become relative tables, and indices are clamped to stay in range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.evaluate import evaluate
from attnfx.expr import INDEX, Call, Expr, Int, Load, children
from attnfx.integers import Ranges
from attnfx.nodes import has_score
from attnfx.site import AttentionSite

I, J, H = INDEX["i"], INDEX["j"], INDEX["h"]

#: The number of keys, which every relative table's index needs; filled in from the key tensor at run time.
KEYS = sympy.Symbol("attnfx_keys", integer=True, nonnegative=True)

#: A formula of i - j with at most this many operations and no gather is computed in the tile.
CHEAP = 4


@dataclass(frozen=True)
class Table:
    """Side tensor ``slot``, (H or 1, M + N - 1), whose element [h, i - j + N - 1] is ``recipe``: a formula in h and i - j."""

    slot: int
    recipe: Expr
    per_head: bool

    def build(self, query: Tensor, keys: int, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int]) -> Tensor:
        """The table for ``query`` (B,H,M,D), differentiable in ``loads``; float32, or float64 for a float64 query.

        O(H * (M + N)) memory.
        """
        device, heads, queries, wide_query = query.device, query.shape[1], query.shape[2], query.dtype == torch.float64
        delta = torch.arange(1 - keys, queries, device=device)
        rows = torch.arange(heads, device=device)[:, None] if self.per_head else torch.zeros(1, 1, dtype=torch.int64, device=device)
        # Half-precision parameters are read in float32 (exactly), so that their gradients are summed in float32.
        wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in loads]
        grid = {"h": rows, "i": delta, "j": torch.zeros_like(delta)}
        made = evaluate(self.recipe, grid, wide, values, dtype=torch.float64 if wide_query else None)
        return made.to(torch.float64 if wide_query else self.dtype).expand(rows.shape[0], delta.shape[0]).contiguous()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.recipe.dtype == torch.float64 else torch.float32


def size_symbol(slot: int, axis: int) -> sympy.Symbol:
    """Stands for the size of one axis of a side tensor; filled in from the tensor at run time."""
    return sympy.Symbol(f"attnfx_size_{slot}_{axis}", integer=True, positive=True)


def extract(score: Expr, site: AttentionSite, first_slot: int) -> tuple[Expr, tuple[Table, ...]]:
    """``score`` with its maximal relative subexpressions replaced by loads of tables, and the tables."""
    made: dict[Expr, Table] = {}

    def leaf(node: Expr) -> Expr | None:
        if has_score(node) or not _relative(node):
            return None
        if not _worthwhile(node, site):
            return node
        if node not in made:
            made[node] = Table(first_slot + len(made), node, per_head=expr.depends_on(node, "h"))
        table = made[node]
        row = expr.index("h") if table.per_head else expr.integer(0)
        return Load(table.slot, (row, Int(I - J + KEYS - 1)), table.dtype)

    return expr.rebuild(score, leaf), tuple(made.values())


def _relative(e: Expr) -> bool:
    """Whether a float expression depends on i and j, only through i - j, and not on b."""
    if not e.dtype.is_floating_point or not expr.depends_on(e, "i") or not expr.depends_on(e, "j") or expr.depends_on(e, "b"):
        return False
    return expr.substitute(e, {I: I + 1, J: J + 1}) == e


def _worthwhile(e: Expr, site: AttentionSite) -> bool:
    for n in expr.walk(e):
        if isinstance(n, Load):
            assert isinstance(n.slot, int)
            if site.side[n.slot].requires_grad or any(expr.depends_on(x, "i", "j") for x in n.indices):
                return True
    return sum(isinstance(n, Call) and n.op != "cast" for n in expr.walk(e)) > CHEAP


def clamped(e: Expr, site: AttentionSite) -> Expr:
    """``e`` with every load index that is not proved in range clamped: a branch not taken may compute any index."""
    ranges = index_ranges(site)
    memo: dict[Expr, Expr] = {}

    def leaf(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        if node not in memo:
            assert isinstance(node.slot, int)
            shape, indices = site.side[node.slot].shape, [expr.rebuild(x, leaf) for x in children(node)]
            bounded = [
                _within(x, n, size_symbol(node.slot, d), ranges) for d, (x, n) in enumerate(zip(indices, shape, strict=True))
            ]
            memo[node] = Load(node.slot, tuple(bounded), node.dtype)
        return memo[node]

    return expr.rebuild(e, leaf)


def index_ranges(site: AttentionSite) -> Ranges:
    """What is known of the size symbols and of the four indices."""
    ends = {"b": site.batch, "h": site.heads, "i": site.queries, "j": site.keys}
    known = site.ranges
    low = {**{INDEX[name]: sympy.Integer(0) for name in ends}, **known.low}
    return Ranges(low, {**{INDEX[name]: end - 1 for name, end in ends.items()}, **known.high})


def _within(index: Expr, size: sympy.Expr, symbol: sympy.Symbol, ranges: Ranges) -> Expr:
    if isinstance(index, Int) and ranges.nonnegative(index.value) and ranges.nonnegative(size - 1 - index.value):
        return index
    last = Int(size - 1 if size.is_Integer else symbol - 1)
    return Call("max", (Call("min", (index, last), torch.int64), expr.integer(0)), torch.int64)
