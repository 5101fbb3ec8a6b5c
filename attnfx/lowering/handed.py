"""What the generated functions of a plan are handed: side tensors in the form that costs a tile least, and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Expr, Load
from attnfx.lowering.codegen_print import LOG2E, MASKED_OUT
from attnfx.lowering.plan import KernelPlan


@dataclass(frozen=True)
class Handed:
    """The slots whose tensors are not handed on as they are.

    distances  tables of distances: given from their middle on, where i = j
    in_base_2  those of them that are added to the logits and read by nothing else: multiplied by log2(e) once a call and not in
               every tile
    masks      whether a mask's finfo.min in them must stay finite
    """

    distances: frozenset[int]
    in_base_2: frozenset[int]
    masks: bool


def handed(plan: KernelPlan) -> Handed:
    """What a plan's functions are handed; found once for each plan."""
    found = plan.__dict__.get("_handed")
    if found is None:
        found = plan.__dict__["_handed"] = _handed(plan)
    assert isinstance(found, Handed)
    return found


def pointers(plan: KernelPlan, keys: int, loads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The side tensors in use, in the order and form of `loads` in the generated functions."""
    form = handed(plan)
    return tuple(_formed(form, slot, keys, loads[slot]) for slot in plan.used_slots)


def ints(plan: KernelPlan, values: Mapping[sympy.Symbol, int], tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The numbers of one call: the values of `plan.kernel_symbols`, then the strides of each of the :func:`pointers`."""
    strides = [s for t in tensors for s in t.stride()]
    return (*(int(values[s]) for s in plan.kernel_symbols), *strides)


def _formed(form: Handed, slot: int, keys: int, tensor: Tensor) -> Tensor:
    if slot in form.in_base_2:
        scaled = tensor * LOG2E
        # what `to_base_2` of templates/arithmetic.py makes of each number
        tensor = torch.where(tensor < MASKED_OUT, tensor, scaled) if form.masks else scaled
    return tensor[..., keys - 1 :] if slot in form.distances else tensor


def _handed(plan: KernelPlan) -> Handed:
    distances = frozenset(t.slot for t in plan.tables if t.relative)
    others = [e for e in plan.tile_expressions if e is not plan.site.score]
    parts = list(_added(plan.site.score))
    readers = Counter(n.slot for e in parts + others for n in expr.walk(e) if isinstance(n, Load))
    alone = {part.slot for part in parts if isinstance(part, Load)}
    in_base_2 = frozenset(slot for slot in distances if slot in alone and readers[slot] == 1)
    return Handed(distances, in_base_2, plan.site.literal is None)


def _added(e: Expr) -> Iterator[Expr]:
    """The summands of the logits."""
    if isinstance(e, Call) and e.op == "add" and has_score(e):
        for part in e.args:
            yield from _added(part)
    else:
        yield e
