"""Proof that a block table lists every block in which a mask keeps something: then the mask alone says what is kept.

The graph holds the table's construction where create_block_mask ran inside of it: a dense mask, the number S of kept elements of
each block of T, and for the partial blocks (0 < S < T) and the full ones (S = T) how many there are in each row and their columns,
sorted to the front. A column is among the first ``sum(d)`` of ``argsort(d, descending=True)`` exactly where ``d`` of it is 1.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from attnfx import expr
from attnfx.expr import Expr
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.lift import operation
from attnfx.patterns.lift_moves import argument, integer_of

_COPIES = ("aten.to", "aten._to_copy", "aten.clone", "aten.contiguous")


def blocked_mask(
    mirror: Mirror, at: fx.Node, pairs: list[tuple[fx.Node, fx.Node]], rows: sympy.Expr, columns: sympy.Expr
) -> fx.Node | None:
    """The dense mask (B', H', M', N') whose non-empty blocks of ``rows`` x ``columns`` the partial and the full pair list; None
    where the graph does not show that they do."""
    if len(pairs) != 2:
        return None
    partial, full = (_flags(*pair) for pair in pairs)
    if (
        partial is None
        or full is None
        or operation(full) != "aten.eq"
        or operation(partial) not in ("aten.__and__", "aten.logical_and")
    ):
        return None
    counts, whole = full.args
    low, high = partial.args
    if not (isinstance(low, fx.Node) and isinstance(high, fx.Node) and isinstance(counts, fx.Node)):
        return None
    if operation(low) != "aten.gt" or low.args != (counts, 0) or operation(high) != "aten.lt" or high.args != (counts, whole):
        return None
    if not isinstance(whole, int | fx.Node) or sympy.expand(integer_of(whole) - rows * columns) != 0:
        return None
    mask = _counted(counts, rows, columns)
    path = [n for pair in pairs for n in pair] + [partial, full, low, high, counts]
    return None if mask is None or any(mirror.overwritten(n, at) for n in (*path, mask)) else mask


def _plain(node: Any) -> Any:
    while isinstance(node, fx.Node) and operation(node) in _COPIES:
        node = node.args[0]
    return node


def _flags(count: fx.Node, listed: fx.Node) -> fx.Node | None:
    """The boolean tensor ``d`` with ``count = sum(d)`` and ``listed = argsort(d, descending)`` over its last axis."""
    total, order = _plain(count), _plain(listed)
    if not (isinstance(total, fx.Node) and operation(total) == "aten.sum" and isinstance(order, fx.Node)):
        return None
    if (
        operation(order) != "aten.argsort"
        or order.kwargs.get("descending") is not True
        or order.kwargs.get("dim", -1) not in (-1, 3)
    ):
        return None
    if argument(total, 1, "dim") not in ([-1], [3]) or argument(total, 2, "keepdim", False) or total.args[0] is not order.args[0]:
        return None
    flags = _plain(order.args[0])
    boolean = isinstance(flags, fx.Node) and str(flags.meta["val"].dtype) == "torch.bool" and len(sizes(flags)) == 4
    return flags if boolean else None


def _counted(counts: fx.Node, rows: sympy.Expr, columns: sympy.Expr) -> fx.Node | None:
    """The boolean tensor of which ``counts`` holds the number of true elements of each block."""
    if (
        operation(counts) != "aten.sum"
        or argument(counts, 1, "dim") not in ([-2, -1], [4, 5])
        or argument(counts, 2, "keepdim", False)
    ):
        return None
    moved = counts.args[0]
    if not (
        isinstance(moved, fx.Node) and operation(moved) == "aten.permute" and list(argument(moved, 1, "dims")) == [0, 1, 2, 4, 3, 5]
    ):
        return None
    split = moved.args[0]
    if not (isinstance(split, fx.Node) and operation(split) in ("aten.view", "aten.reshape")):
        return None
    padded = split.args[0]
    assert isinstance(padded, fx.Node)
    shape, whole = sizes(split), sizes(padded)
    fits = len(whole) == 4 and len(shape) == 6 and (shape[3], shape[5]) == (rows, columns) and shape[:2] == whole[:2]
    if not fits or any(sympy.expand(a * b - n) != 0 for a, b, n in ((shape[2], rows, whole[2]), (shape[4], columns, whole[3]))):
        return None
    mask = padded
    if operation(padded) in ("aten.pad", "aten.constant_pad_nd"):
        amounts = [integer_of(x) for x in argument(padded, 1, "pad")]
        if (
            len(amounts) != 4
            or amounts[0] != 0
            or amounts[2] != 0
            or argument(padded, 2, "mode", "constant") not in ("constant", 0, False)
        ):
            return None
        mask = padded.args[0]  # type: ignore[assignment]
    return mask if str(mask.meta["val"].dtype) == "torch.bool" else None


def same(a: Expr, b: Expr) -> bool:
    """Whether two predicates are the same conjunction."""
    terms = [frozenset(x.args) if isinstance(x, expr.Call) and x.op == "and" else frozenset((x,)) for x in (a, b)]
    return terms[0] == terms[1]
