"""Block tables of flex_attention: which blocks of queries and keys are visited at all, as one small boolean tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.callees import derive
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.block_proof import blocked_mask, same
from attnfx.patterns.candidate import Refused
from attnfx.patterns.lift import Index, Lifter
from attnfx.patterns.lift_moves import integer_of
from attnfx.patterns.lift_values import LARGEST_SIZE

_ATEN: Any = torch.ops.aten


@dataclass(frozen=True)
class BlockTable:
    """``dense[b, h, row, column]`` (bool, with one column more that is False) for blocks of ``rows`` queries and ``columns`` keys;
    ``dense`` is None where every block is listed, ``mask`` the dense mask that the table was made of, where the graph shows it."""

    dense: fx.Node | None
    rows: sympy.Expr
    columns: sympy.Expr
    mask: fx.Node | None = None

    def implied(self, lifter: Lifter, index: Index, keep: Expr) -> bool:
        """Whether every block with a kept element is listed: ``keep`` at (b, h, i, j) is the mask that the table was made of."""
        if self.dense is None or self.mask is None:
            return self.dense is None
        found = lifter.element(
            self.mask, tuple(expr.integer(0) if n == 1 else x for n, x in zip(sizes(self.mask), index, strict=True))
        )
        return same(found, keep)

    def listed(self, lifter: Lifter, index: Index) -> Expr:
        """Whether the block of element ``index`` (b, h, i, j) is visited. Tables of one batch entry or head hold for all."""
        if self.dense is None:
            return expr.TRUE
        shape = sizes(self.dense)
        b, h, i, j = index
        at = (
            lifter.modulo(b, shape[0]) if shape[0] != 1 else expr.integer(0),
            lifter.modulo(h, shape[1]) if shape[1] != 1 else expr.integer(0),
            lifter.floordiv(i, self.rows) if shape[2] != 1 else expr.integer(0),
            lifter.floordiv(j, self.columns),
        )
        return Load(self.dense, at, torch.bool)


def block_table(
    mirror: Mirror, at: fx.Node, block_mask: Any, scores: tuple[sympy.Expr, ...], known: dict[tuple[object, ...], BlockTable]
) -> BlockTable:
    """The table in the ``block_mask`` argument of the call ``at`` on ``scores`` (B, H, M, N). ``known``: tables made before."""
    count, columns, full_count, full_columns = block_mask[2:6]
    rows_each, columns_each = (integer_of(x) for x in block_mask[-3:-1])
    pairs = [(n, x) for n, x in ((count, columns), (full_count, full_columns)) if is_tensor(n) and is_tensor(x)]
    if not pairs:
        raise Refused("its block mask has no table of blocks")
    key = (*(n for pair in pairs for n in pair), rows_each, columns_each)
    if key in known and not any(mirror.overwritten(n, at) for pair in pairs for n in pair):
        return known[key]
    if sympy.expand(sizes(columns)[2] * rows_each - scores[2]).is_negative:
        raise Refused(f"its block mask has rows for {sizes(columns)[2] * rows_each} of its {scores[2]} queries")
    dense = None if _everything(mirror, at, pairs[0], scores, rows_each, columns_each) else _dense(mirror, at, pairs)
    known[key] = BlockTable(dense, rows_each, columns_each, blocked_mask(mirror, at, pairs, rows_each, columns_each))
    return known[key]


def _everything(
    mirror: Mirror,
    at: fx.Node,
    pair: tuple[fx.Node, fx.Node],
    scores: tuple[sympy.Expr, ...],
    rows: sympy.Expr,
    columns: sympy.Expr,
) -> bool:
    """Whether the table is one block, listed by a constant, that no query and no key is outside of: an empty block mask."""
    count, listed = pair
    free = {s for n in scores for s in n.free_symbols}
    ranges = Ranges(mirror.ranges.low, {**dict.fromkeys(free, sympy.Integer(LARGEST_SIZE)), **mirror.ranges.high})
    inside = ranges.nonnegative(rows - scores[2]) and ranges.nonnegative(columns - scores[3])
    if not inside or any(n != 1 for node in pair for n in sizes(node)):
        return False
    lifter, first = Lifter(mirror, mirror.ranges, at=at), expr.integer(0)
    return lifter.element(count, (first,) * 3) == Int(sympy.Integer(1)) and lifter.element(listed, (first,) * 4) == first


def _dense(mirror: Mirror, at: fx.Node, pairs: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
    """Nodes that spread lists of block columns (count (B,H,R), columns (B,H,R,C)) over (B,H,R,C+1)."""

    def new(target: Any, *args: Any) -> fx.Node:
        return derive(mirror, at, target, *args)

    found: fx.Node | None = None
    for count, columns in pairs:
        position = new(_ATEN.cumsum.default, new(_ATEN.ones_like.default, columns), -1)
        valid = new(_ATEN.le.Tensor, position, new(_ATEN.unsqueeze.default, count, -1))
        times = new(_ATEN.to.dtype, valid, torch.int64)
        column = new(_ATEN.mul.Tensor, new(_ATEN.to.dtype, columns, torch.int64), times)  # what is not valid may hold anything
        counted = new(_ATEN.scatter_add.default, new(_ATEN.zeros_like.default, column), -1, column, times)
        dense = new(_ATEN.gt.Scalar, counted, 0)
        found = dense if found is None else new(_ATEN.logical_or.default, found, dense)
    assert found is not None
    none = new(_ATEN.zeros_like.default, new(_ATEN.slice.Tensor, found, 3, 0, 1))
    return new(_ATEN.cat.default, [found, none], 3)
