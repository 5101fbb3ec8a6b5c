"""Masks that know of a pair only how far its key is from its query: blocks that lie alike have the same one."""

from __future__ import annotations

from functools import lru_cache

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.expr import INDEX, Call, Expr, Int
from attnfx.lowering.portable.blocks import Block, Problem

#: Elements of a mask that is remembered, and how many are: 16 MB of float32.
ELEMENTS = 1 << 17
REMEMBERED = 32

_SHIFT = sympy.Symbol("attnfx_shift", integer=True)
Values = tuple[tuple[sympy.Symbol, int], ...]


@lru_cache(maxsize=256)
def by_distance(keep: Expr) -> bool:
    """Whether ``keep`` is the same for i + t and j + t as for i and j, whatever t is."""
    if not isinstance(keep, Call):
        return not expr.depends_on(keep, "b", "h", "i", "j")
    if keep.op in expr.COMPARE and all(isinstance(a, Int) for a in keep.args):
        left, right = (a.value for a in keep.args if isinstance(a, Int))
        return _stays(left - right)
    if keep.op in ("and", "or", "not", "abs", *expr.COMPARE):
        return all(_stays(a.value) if isinstance(a, Int) else by_distance(a) for a in keep.args)
    return False


def additive(problem: Problem, block: Block) -> Tensor | None:
    """0 where the mask keeps, -inf elsewhere, (R,C) float32, for a mask :func:`by_distance`; None where it is another, too large to
    be remembered, or of keys that lie apart."""
    keep, size = problem.plan.site.keep, len(block.rows) * len(block.keys)
    if block.full or block.at is not None or block.unsure is not None or size > ELEMENTS or not by_distance(keep):
        return None
    known = tuple((s, problem.values[s]) for s in _sizes(keep))
    return _additive(keep, known, block.rows.start - block.keys.start, len(block.rows), len(block.keys), problem.q.device)


@lru_cache(maxsize=REMEMBERED)
def _additive(keep: Expr, values: Values, ahead: int, rows: int, keys: int, device: torch.device) -> Tensor:
    i = torch.arange(ahead, ahead + rows, device=device)[:, None]
    kept = evaluate(keep, {"i": i, "j": torch.arange(keys, device=device)}, (), dict(values))
    return torch.zeros((rows, keys), dtype=torch.float32, device=device).masked_fill_(~kept, float("-inf"))


@lru_cache(maxsize=256)
def _sizes(keep: Expr) -> tuple[sympy.Symbol, ...]:
    """The symbols in ``keep`` that are no positions."""
    found = {s for n in expr.walk(keep) if isinstance(n, Int) for s in n.value.free_symbols}
    return tuple(sorted(found - set(INDEX.values()), key=str))


def _stays(e: sympy.Expr) -> bool:
    i, j = INDEX["i"], INDEX["j"]
    return bool(sympy.expand(e.xreplace({i: i + _SHIFT, j: j + _SHIFT}) - e) == 0)
