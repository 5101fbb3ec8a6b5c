"""Tables that stand for parts of a score program, and indices that are clamped to stay in range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.integers import Ranges
from attnfx.expr import INDEX, Call, Expr, Int, Load, children
from attnfx.site import AttentionSite

I, J, H = INDEX["i"], INDEX["j"], INDEX["h"]

#: The number of keys, which every relative table's index needs; filled in from the key tensor at run time.
KEYS = sympy.Symbol("attnfx_keys", integer=True, nonnegative=True)

#: What an axis of a table is: an index, "i-j" (M + N - 1 distances), or "" for one element.
TABLE_AXES = ("", "b", "h", "i", "j", "i-j")


@dataclass(frozen=True)
class Table:
    """Side tensor ``slot``, made once a call: its element at ``axes`` is ``recipe``, in float32 or float64.

    A table of distances has the axes ("h" or "", "i-j") and holds i - j at i - j + N - 1; any other has those of "b", "h", "i", "j"
    that the recipe depends on.
    """

    slot: int
    recipe: Expr
    axes: tuple[str, ...]

    @property
    def relative(self) -> bool:
        """Whether it is a table of distances."""
        return self.axes[-1:] == ("i-j",)

    @property
    def element(self) -> Load:
        """The load of its element for b, h, i and j."""
        places = {"": expr.integer(0), "i-j": Int(I - J + KEYS - 1)}
        return Load(self.slot, tuple(places[a] if a in places else expr.index(a) for a in self.axes), self.dtype)

    def shape(self, batch: Any, heads: Any, queries: Any, keys: Any) -> tuple[Any, ...]:
        """Its sizes, from sizes that are numbers or expressions."""
        sizes = {"": 1, "b": batch, "h": heads, "i": queries, "j": keys, "i-j": queries + keys - 1}
        return tuple(sizes[a] for a in self.axes)

    def build(self, query: Tensor, keys: int, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int]) -> Tensor:
        """The table for ``query`` (B,H,M,D), differentiable in ``loads``; float32, or float64 for a float64 query."""
        device, queries, wide_query = query.device, query.shape[2], query.dtype == torch.float64
        batch, heads = query.shape[:2]
        shape = self.shape(batch, heads, queries, keys)
        grid = {}
        for place, (axis, size) in enumerate(zip(self.axes, shape, strict=True)):
            first, past = (1 - keys, queries) if axis == "i-j" else (0, size)
            along = [-1 if d == place else 1 for d in range(len(shape))]
            grid["i" if axis == "i-j" else axis] = torch.arange(first, past, device=device).view(along)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        grid = {name: grid.get(name, zero) for name in "bhij"}
        # Half-precision parameters are read in float32 (exactly), so that their gradients are summed in float32.
        wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in loads]
        made = evaluate(self.recipe, grid, wide, values, dtype=torch.float64 if wide_query else None)
        return made.to(torch.float64 if wide_query else self.dtype).expand(shape).contiguous()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.recipe.dtype == torch.float64 else torch.float32


def size_symbol(slot: int, axis: int) -> sympy.Symbol:
    """Stands for the size of one axis of a side tensor; filled in from the tensor at run time."""
    return sympy.Symbol(f"attnfx_size_{slot}_{axis}", integer=True, positive=True)


def relative(e: Expr) -> bool:
    """Whether a float expression depends on i and j, only through i - j, and not on b."""
    if not e.dtype.is_floating_point or not expr.depends_on(e, "i") or not expr.depends_on(e, "j") or expr.depends_on(e, "b"):
        return False
    return expr.substitute(e, {I: I + 1, J: J + 1}) == e


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
