"""Calls to tune: a plan and tensors, as an operator has them, forward and backward."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "lowering"))

from band_sites import banded, tensors
from lowering_sites import KEYS, QUERIES, SCALED, B, Example, H, I, J, alibi, causal, load, side, site, window

from attnfx import expr
from attnfx.lowering import bands, blocks, portable
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.tuning.operands import Operands


def example(name: str, **changes: Any) -> Example:
    """A site by name: ALiBi under a causal mask, a window, a learned bias (tile, column), documents, a band, or else causal."""
    if name == "band":
        made = banded(keep=causal(KEYS - QUERIES), **changes)
        return Example(name, made, tensors(made))
    heads = changes.get("heads", 4)
    learned = {
        "tile": ((heads, changes.get("queries", 37), changes.get("keys", 53)), (H, I, J)),
        "column": ((changes.get("keys", 53),), (J,)),
    }
    if name in learned:
        shape, indices = learned[name]
        made = site(SCALED + load(0, *indices), causal(16), side=(side(*shape, grad=True),), **changes)
        return Example(name, made, lambda dtype: (torch.randn(shape, dtype=dtype),))
    if name == "alibi":
        made = site(alibi(), causal(changes.get("keys", 53) - changes.get("queries", 37)), side=(side(heads),), **changes)
        return Example(name, made, lambda dtype: (torch.rand(heads),))
    if name == "documents":
        keep = expr.logical_and(causal(), expr.eq(*(load(0, B, x, dtype=torch.int64) for x in (I, J))))
        shape = (changes.get("batch", 2), changes["keys"])
        made = site(keep=keep, side=(side(*shape, dtype=torch.int64),), empty_rows="zero", **changes)
        return Example(name, made, lambda dtype: (torch.randint(0, 3, shape).sort(-1).values,))
    return Example(name, site(keep=window(7) if name == "window" else causal(16), **changes))


def forward_call(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Operands:
    """A call of `attnfx::flash`, of random tensors on the CPU."""
    torch.manual_seed(0)
    made = example(name, dtype=dtype, **changes)
    plan, s = make_plan(made.site, "flash"), made.site
    assert isinstance(plan, KernelPlan), plan
    b, h, hk, m, n = (int(x) for x in (s.batch, s.heads, s.key_heads, s.queries, s.keys))
    shapes = ((b, h, m, s.head_dim), (b, hk, n, s.head_dim), (b, hk, n, s.value_dim))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    given = [t.detach() for t in made.loads(torch.float32)]
    tables = [t.build(q, n, given, plan.values((), n, given)) for t in plan.tables]
    if plan.site.band is not None:
        tables.append(bands.build(plan.site, given, m, n, plan.values((), n, given)))
    call = Operands(plan.to_json(), q, k, v, (*given, *tables), ())
    if blocks.mask_of(call.text) is None or not blocks.worthwhile(m, n):
        return call
    rows, keys = (torch.zeros(blocks.shape(b, 1, m, n, by_keys), dtype=torch.int32) for by_keys in (False, True))
    return replace(call, row_blocks=rows, key_blocks=keys)  # as many lists as there are, all of them empty


def backward_call(call: Operands) -> Operands:
    """The call of `attnfx::flash_backward` that follows."""
    results = portable.forward(call.plan, call.q, call.k, call.v, call.loads, call.sizes, call.seed)
    grad = torch.randn(results.out.shape).to(results.out.dtype)
    fields: dict[str, Tensor] = results._asdict()
    return replace(call, **fields, grad_out=grad)
