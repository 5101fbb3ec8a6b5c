"""Run as a script under TRITON_INTERPRET=1: the generated kernels against the portable blocks, a JSON line an example."""

from __future__ import annotations

import json
import sys
import traceback

import torch
from lowering_sites import MIN32, SCALED, B, Example, I, J, causal, distance, examples, inputs, load, side, site, t5

from attnfx import expr
from attnfx.expr import Int
from attnfx.integers import Max, Min
from attnfx.lowering import kernel_gradients, ops, portable
from attnfx.lowering.plan import KernelPlan, make_plan

NAMES = (
    "causal 16", "window", "softcap", "key range", "causal -16 -3.40282e+38 replaced", "padded -inf replaced",
    "padded -1e+09 added", "alibi", "t5", "bias tile", "bias column shared", "bias row", "gather", "loaded mask",
    "bias folded, with a factor", "bias of key heads", "bias tile capped", "bias head capped",
    "bias row under a fill in reach", "bias head under a fill in reach",
)  # fmt: skip


def chosen() -> list[Example]:
    """A handful of the examples, and some with what only kernels and blocks share: dropout, flooring, choices, wide indices."""
    found = [e for e in examples() if e.name in NAMES]
    assert len(found) == len(NAMES), sorted(set(NAMES) - {e.name for e in found})
    dropped = site(t5(), causal(16), side=(side(32, 4, grad=True),), dropout=0.3)
    floored = expr.eq(expr.floordiv(J - I, expr.integer(4)), expr.floordiv(I - J, expr.integer(4)))
    # float16, not bfloat16, to which the interpreter truncates
    half = expr.cast(load(0, B, J, dtype=torch.float16) * expr.constant(0.3, torch.float16), torch.float32)
    more = [
        Example("dropout", dropped, lambda dtype: (torch.randn(32, 4, requires_grad=True),)),
        Example("chosen", site(keep=expr.le(J, Int(Max(I.value - 5, Min(9, 40 - I.value)))))),
        Example("floored", site(keep=expr.logical_not(floored), empty_rows="fill", fill=MIN32)),
        Example(
            "fp16 bias",
            site(SCALED + half, side=(side(2, 53, dtype=torch.float16),)),
            lambda dtype: (torch.randn(2, 53).half(),),
        ),
    ]
    return found + more


def run(example: Example) -> dict[str, float]:
    """The largest difference of each output and gradient, kernels against blocks."""
    plan = make_plan(example.site, "flash")
    assert isinstance(plan, KernelPlan), plan
    text, seed = plan.to_json(), torch.tensor([987654321012345]) if plan.site.dropout else None
    q, k, v = (t.detach() for t in inputs(example.site, torch.float32))
    given = [t.detach() for t in example.loads(torch.float32)]
    loads = [*given, *(t.build(q, k.shape[2], given, plan.values((), k.shape[2], given)) for t in plan.tables)]
    grad = torch.randn(*q.shape[:3], v.shape[3])
    mine = ops._forward(True, q, k, v, loads, (), seed, text)
    theirs = portable.forward(plan, q, k, v, loads, (), seed)
    errors = {"out": distance(mine.out, theirs.out), "lse": distance(mine.lse[mine.lse > -1e30], theirs.lse[theirs.lse > -1e30])}
    assert [t.shape for t in mine] == [t.shape for t in theirs]
    assert [t.stride() for t in mine] == [t.stride() for t in theirs]
    kernel = kernel_gradients.backward(plan, q, k, v, loads, (), seed, mine, grad, None, text)
    blocks = portable.backward(plan, q, k, v, loads, (), seed, theirs, grad, None)
    names = ("dq", "dk", "dv", *(f"gradient of {g.slot}" for g in plan.gradients))
    return errors | {name: distance(a, b) for name, a, b in zip(names, kernel, blocks, strict=True)}


def main() -> None:
    for example in chosen():
        try:
            line = {"name": example.name, "errors": run(example)}
        except Exception:
            line = {"name": example.name, "failure": traceback.format_exc()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
