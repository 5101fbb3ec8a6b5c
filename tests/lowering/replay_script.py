"""Run as a script under TRITON_INTERPRET=1: calls made again against the portable blocks, a JSON line an example."""

from __future__ import annotations

import json
import sys
import traceback

import torch
from block_sites import BATCH, KEYS, QUERIES, masks
from interpreter_script import chosen
from lowering_sites import Example, distance, inputs

from attnfx.lowering import bands, blocks, flash, ops, portable, replay
from attnfx.lowering.linear import ops as linear
from attnfx.lowering.linear import portable as linear_portable
from attnfx.lowering.plan import KernelPlan, make_plan

NAMES = ("window", "bias column shared", "dropout")
LONG = ("window",)  # by the kernels for many rows
CALLS = 4
blocks.KEYS = 256  # lists are made of few keys, too
is_short = flash.is_short


def run(example: Example) -> dict[str, float]:
    """The largest differences of the last of some calls, each on tensors of its own."""
    plan = make_plan(example.site, "flash")
    assert isinstance(plan, KernelPlan), plan
    text, errors = plan.to_json(), dict[str, float]()
    replay.forget()
    flash.is_short = (lambda *_: False) if example.name in LONG else is_short
    for call in range(CALLS):
        torch.manual_seed(call)
        seed = torch.tensor([987654321012345 + call]) if plan.site.dropout else None
        q, k, v = (t.detach() for t in inputs(example.site, torch.float32))
        given = [t.detach() for t in example.loads(torch.float32)]
        values = plan.values((), k.shape[2], given)
        loads = [*given, *(t.build(q, k.shape[2], given, values) for t in plan.tables)]
        if plan.site.band is not None:
            loads.append(bands.build(plan.site, given, q.shape[2], k.shape[2], values))
        mine = ops._forward(True, q, k, v, loads, (), seed, text)
        theirs = portable.forward(plan, q, k, v, loads, (), seed)
        grad = torch.randn(*q.shape[:3], v.shape[3])
        kernel = ops._backward(True, q, k, v, loads, (), seed, text, *mine, grad, None)
        plain = portable.backward(plan, q, k, v, loads, (), seed, theirs, grad, None)
        assert [t.stride() for t in mine] == [t.stride() for t in theirs]
        lse = distance(mine.lse[mine.lse > -1e30], theirs.lse[theirs.lse > -1e30])
        errors = {"out": distance(mine.out, theirs.out), "lse": lse}
        errors |= {str(n): distance(a, b) for n, (a, b) in enumerate(zip(kernel, plain, strict=True))}
    return errors | remembered(2)


def linear_attention() -> dict[str, float]:
    errors = dict[str, float]()
    replay.forget()
    for call in range(CALLS):
        torch.manual_seed(call)
        q, k, v = (torch.rand(2, heads, 37, 16) for heads in (4, 2, 2))
        given = (q, k, v, None, None, None, True, True, 1e-6, "add")
        mine, theirs = linear._forward(*given, 1.0), linear_portable.forward(*given)
        grad = torch.randn_like(mine.out)
        rest = (grad, None, None, None, *given[6:])
        found = [
            linear._backward(*given[:6], mine.out, mine.sums, *rest, 1.0),
            linear_portable.backward(*given[:6], theirs.out, theirs.sums, *rest),
        ]
        errors = {"out": distance(mine.out, theirs.out)}
        errors |= {str(n): distance(a, b) for n, (a, b) in enumerate(zip(*found, strict=True))}
    return errors | remembered(2)


def lists() -> dict[str, float]:
    """Lists of tiles of masks that are data: another mask in each call."""
    replay.forget()
    one, other = (next(e for e in masks() if e.name == name) for name in ("documents", "neighbourhood"))
    return {"documents": wrong(one), "neighbourhood": wrong(other)} | remembered(1)  # which has no tensors


def wrong(example: Example) -> float:
    """Places of the lists of some calls that are not as they should be."""
    plan = make_plan(example.site, "flash")
    assert isinstance(plan, KernelPlan), plan
    found = blocks.mask_of(plan.to_json())
    assert found is not None
    alone, count = KernelPlan.from_json(found.text), 0.0
    batch, heads = BATCH if found.per_batch else 1, int(alone.site.heads) if found.per_head else 1
    for call in range(CALLS):
        loads = [example.loads(torch.float32)[s].roll(37 * call, -1) for s in found.slots]
        mine = ops._blocks(loads, (), batch, heads, QUERIES, KEYS, False, torch.device("cpu"), found.text)
        values = alone.values((), KEYS, loads)
        want = blocks.plain(alone.site.keep, loads, values, batch, heads, QUERIES, KEYS, False, torch.device("cpu"))
        count += float((torch.where(want < 0, want, mine) != want).sum())
    return count


def remembered(calls: int) -> dict[str, float]:
    """0 where so many kinds of calls have a tape that was proved."""
    return {"calls without a tape": float(calls - len(replay._proved))}


def main() -> None:
    jobs = {e.name: lambda e=e: run(e) for e in chosen() if e.name in NAMES}
    assert len(jobs) == len(NAMES), sorted(jobs)
    for name, job in {**jobs, "linear": linear_attention, "lists": lists}.items():
        try:
            line = {"name": name, "errors": job()}
        except Exception:
            line = {"name": name, "failure": traceback.format_exc()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
