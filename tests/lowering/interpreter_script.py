"""Run as a script under TRITON_INTERPRET=1: the generated kernels against the portable blocks, a JSON line an example."""

from __future__ import annotations

import json
import sys
import traceback

import torch
from band_sites import examples as band_examples
from form_sites import examples as form_examples
from lowering_sites import MIN32, SCALED, B, Example, I, J, causal, distance, examples, inputs, load, side, site, t5

from attnfx import expr
from attnfx.algebra.integers import Max, Min
from attnfx.expr import Expr, Int
from attnfx.lowering import bands, kernel_gradients, ops, portable
from attnfx.lowering.plan import KernelPlan, make_plan

NAMES = (
    "chunks", "block causal", "prefix", "bits",
    "causal 16", "window", "softcap", "key range", "causal -16 -3.40282e+38 replaced", "padded -inf replaced",
    "padded -1e+09 added", "alibi", "t5", "bias tile", "bias column shared", "bias row", "gather", "loaded mask",
    "bias folded, with a factor", "bias of key heads", "bias tile capped", "bias head capped",
    "bias row under a fill in reach", "bias head under a fill in reach",
)  # fmt: skip


def chosen() -> list[Example]:
    """A handful of the examples, and more with what only kernels and blocks share: dropout, flooring, choices, wide indices."""
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
    return found + more + form_examples() + list(band_examples()) + [half_fills(queries) for queries in (37, 4)]


def half_fills(queries: int) -> Example:
    """Two fills and a bias added in half precision: rows that have nothing but fills are rounded as the model rounds them."""
    half, keys = torch.float16, 37 if queries == 37 else 530  # many keys for few queries: the other kernels

    def fill(keep: Expr) -> Expr:
        return expr.where(keep, expr.constant(0.0, half), expr.constant(-1e4, half), half)

    ahead, kept = causal(-16 if queries == 37 else -3), load(0, I, J, dtype=torch.bool)
    bias = load(1, I, J, dtype=half)
    wide = expr.call("add", expr.call("add", SCALED, bias, dtype=torch.float32), fill(ahead), dtype=torch.float32)
    typed = SCALED
    for term in (bias, fill(ahead), fill(kept)):
        typed = expr.call("add", typed, term, dtype=half)
    made = site(
        wide, kept, fill=-1e4, additive=True, empty_rows="fill", literal=typed, queries=queries, keys=keys,
        side=(side(queries, keys, dtype=torch.bool), side(queries, keys, dtype=half, grad=True)),
    )  # fmt: skip

    def loads(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        bias = (torch.randn(queries, keys) * 8).half().requires_grad_()
        return (torch.rand(queries, keys) < 0.5) & (torch.arange(queries)[:, None] != 1), bias

    return Example(f"half fills of {queries} queries", made, loads)


def run(example: Example) -> dict[str, float]:
    """The largest difference of each output and gradient, kernels against blocks."""
    plan = make_plan(example.site, "flash")
    assert isinstance(plan, KernelPlan), plan
    text, seed = plan.to_json(), torch.tensor([987654321012345]) if plan.site.dropout else None
    q, k, v = (t.detach() for t in inputs(example.site, torch.float32))
    given = [t.detach() for t in example.loads(torch.float32)]
    values = plan.values((), k.shape[2], given)
    loads = [*given, *(t.build(q, k.shape[2], given, values) for t in plan.tables)]
    if plan.site.band is not None:
        loads.append(bands.build(plan.site, given, q.shape[2], k.shape[2], values))
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
