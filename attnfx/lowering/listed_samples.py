"""Sites whose kernels walk lists of tiles, for the check of what compiles (`crosscompile.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr, Load, Score
from attnfx.lowering import blocks, codegen, handed
from attnfx.lowering.call import Program
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite, SideTensor
from attnfx.sites.ordering import Order

#: Tokens of a site.
LENGTH = 4096
B, I, J = (expr.index(name) for name in "bij")


def documents(batch: int, heads: int) -> AttentionSite:
    """Causal attention inside of documents, by the number of each token's: (B, S)."""
    keep = expr.logical_and(expr.le(J, I), expr.eq(*(Load(0, (B, x), torch.int64) for x in (I, J))))
    return _site(batch, heads, keep, SideTensor((sympy.Integer(batch), sympy.Integer(LENGTH)), torch.int64), True)


def image(batch: int, heads: int) -> AttentionSite:
    """Tokens of 64 x 64 in tiles of 8 x 8, of which each sees a box: its ends along both axes, (4, S)."""
    order = Order((8, 8, 8, 8), (0, 2, 1, 3))
    terms: list[Expr] = []
    for axis, digits in enumerate(((0, 1), (2, 3))):
        place = expr.Int(order.number(digits, expr.INDEX["j"]))
        low, high = (Load(0, (expr.integer(2 * axis + end), I), torch.int32) for end in (0, 1))
        terms += [expr.le(low, place), expr.le(place, high)]
    table = SideTensor((sympy.Integer(4), sympy.Integer(LENGTH)), torch.int32)
    return _site(batch, heads, expr.logical_and(*terms), table, False).replace(order=order)


def lowered(site: AttentionSite, loads: Sequence[Tensor]) -> tuple[Program, list[int], Tensor, Tensor]:
    """The program, the numbers, and the lists by rows and by keys."""
    plan = make_plan(site, "flash")
    assert isinstance(plan, KernelPlan), plan
    mask = blocks.mask_of(plan.to_json())
    assert mask is not None
    batch, numbers = int(site.batch) if mask.per_batch else 1, handed.ints(plan, plan.values((), LENGTH, loads), loads)
    rows, keys = (
        blocks.build(loads, (), batch, 1, LENGTH, LENGTH, by_keys, loads[0].device, mask.text) for by_keys in (False, True)
    )
    return codegen.program(plan), list(numbers), rows, keys


def _site(batch: int, heads: int, keep: Expr, side: SideTensor, trained: bool) -> AttentionSite:
    rows, length = sympy.Integer(heads), sympy.Integer(LENGTH)
    return AttentionSite(
        sympy.Integer(batch), rows, rows, length, length, 64, 64, torch.bfloat16, "cuda", 0.125 * Score(), keep,
        empty_rows="zero", side=(side,), requires_grad=trained,
    )  # fmt: skip
