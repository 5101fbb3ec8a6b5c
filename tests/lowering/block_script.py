"""Run as a script under TRITON_INTERPRET=1: the kernels that make lists and those that walk them, a JSON line an example."""

from __future__ import annotations

import json
import sys
import traceback

import torch
from block_sites import BATCH, KEYS, QUERIES, masks
from lowering_sites import Example

from attnfx.lowering import blocks
from attnfx.lowering.plan import KernelPlan, make_plan

CPU = torch.device("cpu")


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


def main(group: str) -> None:
    jobs = []
    if group == "lists":
        jobs = [(f"{e.name} {k}", lambda e=e, k=k: lists(e, k)) for e in masks() for k in (False, True)]
    for name, job in jobs:
        try:
            line = {"name": name, "errors": job()}
        except Exception:
            line = {"name": name, "failure": traceback.format_exc()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
