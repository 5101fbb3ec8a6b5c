"""Run as a script under TRITON_INTERPRET=1: the kernels that make lists and those that walk them, a JSON line an example."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from block_sites import BATCH, KEYS, QUERIES, biased, masks
from lowering_sites import Example, distance, inputs
from torch.utils._python_dispatch import TorchDispatchMode

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx.lowering import bands, blocks, portable
from attnfx.lowering.plan import KernelPlan, make_plan

CPU = torch.device("cpu")
blocks.KEYS = 256  # Triton's interpreter is slow


def lists(example: Example, by_keys: bool) -> dict[str, float]:
    """Kernels against torch operations: 0 where the lists are the same."""
    plan = make_plan(example.site, "flash")
    assert isinstance(plan, KernelPlan)
    found = blocks.mask_of(plan.to_json())
    assert found is not None
    alone, loads = KernelPlan.from_json(found.text), [example.loads(torch.float32)[s] for s in found.slots]
    batch, heads = BATCH if found.per_batch else 1, int(alone.site.heads) if found.per_head else 1
    mine = blocks.build(loads, (), batch, heads, QUERIES, KEYS, by_keys, CPU, found.text)
    want = blocks.plain(alone.site.keep, loads, alone.values((), KEYS, loads), batch, heads, QUERIES, KEYS, by_keys, CPU)
    return {"lists": float((torch.where(want < 0, want, mine) != want).sum())}


def walked(example: Example) -> dict[str, float]:
    """Output, LSE and gradients of the kernels that walk lists, against the portable blocks."""
    plan = make_plan(example.site, "flash")
    assert isinstance(plan, KernelPlan)
    q, k, v = (t.detach().requires_grad_() for t in inputs(example.site, torch.float32))
    loads, text = list(example.loads(torch.float32)), plan.to_json()
    with Counted() as counted:
        out, lse = torch.ops.attnfx.attention_lse(q, k, v, loads, [], text)
        grad, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf() | lse.isnan(), 0.0)
        learned = [t for t in loads if t.requires_grad]
        mine = torch.autograd.grad((out, lse), (q, k, v, *learned), (grad, grad_lse))
    assert counted.blocks == 2, "lists by rows and by keys"
    wide = [t.detach() for t in (q, k, v)]
    values = plan.values((), KEYS, loads)
    tables = [t.build(q, KEYS, loads, values) for t in plan.tables]
    if plan.site.band is not None:
        tables.append(bands.build(plan.site, loads, QUERIES, KEYS, values))
    loads = [t.detach() for t in (*loads, *tables)]
    theirs = portable.forward(plan, *wide, loads, (), None)
    want = portable.backward(plan, *wide, loads, (), None, theirs, grad, grad_lse)
    if tables:
        want[3:] = torch.autograd.grad(tables, learned, want[3:])
    errors = {"out": distance(out, theirs.out), "lse": distance(lse[lse > -1e30], theirs.lse[theirs.lse > -1e30])}
    return (
        errors
        | {name: distance(a, b) for name, a, b in zip(("dq", "dk", "dv", "dbias"), mine, want, strict=False)}
        | {"gradients": abs(len(mine) - len(want))}
    )


class Counted(TorchDispatchMode):
    """How many lists were made."""

    blocks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.blocks += func is torch.ops.attnfx.blocks.default
        return func(*args, **(kwargs or {}))


def main(groups: list[str]) -> None:
    jobs: list[tuple[str, Callable[[], dict[str, float]]]] = []
    if "lists" in groups:
        jobs += [(f"lists of {e.name} {k}", lambda e=e, k=k: lists(e, k)) for e in masks() for k in (False, True)]
    jobs += [(e.name, lambda e=e: walked(e)) for e in (*masks(), *biased()) if e.name.startswith(tuple(groups))]
    for name, job in jobs:
        try:
            line = {"name": name, "errors": job()}
        except Exception:
            line = {"name": name, "failure": traceback.format_exc()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
