"""Sites with a sink, a factor of the probabilities, or an LSE that is wanted; run as a script, each in Triton's interpreter."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from lowering_sites import (
    BATCH,
    HEADS,
    KEYS,
    MIN32,
    QUERIES,
    SCALED,
    B,
    Example,
    H,
    I,
    J,
    causal,
    distance,
    inputs,
    load,
    named,
    padding,
    random,
    side,
    site,
    softcap,
    t5,
    tell,
    window,
)
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.lowering.plan import Family, KernelPlan, make_plan
from attnfx.site import AttentionSite

LEARNED = side(HEADS, grad=True)
SECOND_MASK = expr.cast(load(0, B, J, dtype=torch.bool), torch.float32)
INTERPRETED = (
    "lse keyless nan", "lse bias", "sink as low as the fill", "sink under a loaded mask", "tile and head mask",
    "bias, sink, mask and gate",
)  # fmt: skip
MASK = side(BATCH, KEYS, dtype=torch.bool)


def examples() -> Iterator[Example]:
    yield Example("lse", site(keep=causal(16)))
    yield Example("lse softcap window", site(softcap(), window(7)))
    yield Example("lse keyless zero", site(keep=causal(-16), empty_rows="zero"))
    yield Example("lse keyless nan", site(keep=causal(-16)))
    padded = site(keep=load(0, B, J, dtype=torch.bool), batch=1, side=(side(1, KEYS, dtype=torch.bool),))
    yield Example("lse keyless nan, whole blocks", padded, lambda dtype: (torch.zeros(1, KEYS, dtype=torch.bool),))
    yield Example("lse keyless -1e4", site(keep=causal(-16), fill=-1e4, empty_rows="fill"))
    yield Example("lse bias", site(t5(), causal(), side=(side(32, HEADS, grad=True),)), random(32, HEADS))
    yield from sinks()
    yield from weights()


def sinks() -> Iterator[Example]:
    sink = load(0, H)
    yield Example("sink", site(keep=causal(), sink=sink, side=(LEARNED,)), random(HEADS))
    yield Example("sink window long", site(keep=window(40), sink=sink, side=(LEARNED,), queries=300, keys=300), random(HEADS))
    yield Example("sink constant", site(sink=expr.constant(0.0, torch.float32)))
    yield Example("sink keyless", site(keep=causal(-16), sink=sink, side=(LEARNED,)), random(HEADS))
    yield Example("sink keyless zero", site(keep=causal(-16), sink=sink, side=(LEARNED,), empty_rows="zero"), random(HEADS))
    filled = site(keep=causal(-16), sink=sink, side=(LEARNED,), fill=-1e4, additive=True, empty_rows="fill")
    yield Example("sink keyless -1e4 added", filled, random(HEADS))
    filled = filled.replace(fill=MIN32, additive=False)
    yield Example("sink keyless finfo.min", filled, random(HEADS))
    low = filled.replace(fill=-2e4)
    yield Example("sink as low as the fill", low, lambda dtype: (torch.full((HEADS,), -2e4, dtype=dtype, requires_grad=True),))
    both = 0.5 * load(0, B, I) + load(1, expr.mod(H, expr.integer(2)))
    shapes = (side(BATCH, QUERIES, grad=True), side(2, grad=True))
    yield Example(
        "sink of rows", site(softcap(), causal(3), sink=both, side=shapes),
        lambda dtype: (*random(BATCH, QUERIES)(dtype), *random(2)(dtype)),
    )  # fmt: skip
    yield Example("sink half", site(sink=load(0, H, dtype=torch.bfloat16), side=(side(HEADS, dtype=torch.bfloat16),)), bf16)
    masked = site(SCALED + load(0, B, I, J), sink=load(1, H), side=(side(BATCH, QUERIES, KEYS), LEARNED))
    yield Example("sink under a loaded mask", masked, lambda dtype: (float_mask(dtype), *random(HEADS)(dtype)))


def weights() -> Iterator[Example]:
    yield Example("head mask", site(keep=causal(), weight=load(0, H), side=(LEARNED,)), random(HEADS))
    gate = side(BATCH, HEADS, QUERIES, grad=True)
    yield Example("gate of rows", site(weight=load(0, B, H, I), side=(gate,)), random(BATCH, HEADS, QUERIES))
    yield Example("second mask", site(keep=causal(), weight=SECOND_MASK, side=(MASK,)), lambda dtype: (padding(True),))
    keyless = site(keep=causal(-16), weight=SECOND_MASK, side=(MASK,), fill=-1e4, empty_rows="fill")
    yield Example("second mask keyless -1e4", keyless, lambda dtype: (padding(True),))
    nan = keyless.replace(fill=-math.inf, empty_rows="nan")
    yield Example("second mask keyless nan", nan, lambda dtype: (padding(True),))
    tile = load(0, H, I, J) * load(1, H)
    yield Example(
        "tile and head mask", site(softcap(), causal(3), weight=tile, side=(side(HEADS, QUERIES, KEYS), LEARNED)),
        lambda dtype: (*random(HEADS, QUERIES, KEYS, grad=False)(dtype), *random(HEADS)(dtype)),
    )  # fmt: skip
    every = site(
        SCALED + load(1, H, I, J), causal(), sink=load(2, H), weight=SECOND_MASK * load(3, B, H),
        side=(MASK, side(HEADS, QUERIES, KEYS, grad=True), LEARNED, side(BATCH, HEADS, grad=True)),
    )  # fmt: skip
    yield Example(
        "bias, sink, mask and gate", every,
        lambda dtype: (padding(), *random(HEADS, QUERIES, KEYS)(dtype), *random(HEADS)(dtype), *random(BATCH, HEADS)(dtype)),
    )  # fmt: skip


def bf16(dtype: torch.dtype) -> Sequence[Tensor]:
    return (torch.randn(HEADS).bfloat16(),)


def float_mask(dtype: torch.dtype) -> Tensor:
    """0 and -inf; row 3 of every batch without keys."""
    keep = torch.rand(BATCH, QUERIES, KEYS) > 0.5
    keep[:, 3] = False
    return torch.where(keep, 0.0, -math.inf).to(dtype)


def plan_text(s: AttentionSite, family: Family) -> str:
    plan = make_plan(s, family)
    assert isinstance(plan, KernelPlan), plan
    return plan.to_json()


def errors(example: Example, family: Family, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Errors of both results and of every gradient, for a gradient of each, against the float64 reference.

    Values that are not finite must be the same; the loss is without LSEs that are not finite.
    """
    given = [t.detach().to(device).requires_grad_(t.requires_grad) for t in (*inputs(example.site, dtype), *example.loads(dtype))]
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.dtype == dtype else t for t in given]
    q, k, v, *loads = given
    got = torch.ops.attnfx.attention_lse(q, k, v, loads, [], plan_text(example.site, family))
    want = example.site.reference_lse(*wide)
    torch.manual_seed(1)
    upstream = torch.randn(got[0].shape).to(got[0]), torch.randn(got[1].shape).to(got[1])

    def loss(results: Sequence[Tensor]) -> Tensor:
        out, lse = results
        return (out * upstream[0]).sum() + torch.where(lse.isfinite(), lse * upstream[1], 0.0).sum()

    leaves = [(a, b) for a, b in zip(given, wide, strict=True) if a.requires_grad]
    grads = torch.autograd.grad(loss(got), [a for a, _ in leaves])
    expected = torch.autograd.grad(loss(want), [b for _, b in leaves], materialize_grads=True)
    found = {"out": distance(got[0], want[0])}
    infinite = want[1].isinf()
    same_places = torch.equal(torch.where(infinite, got[1].double(), 0.0), torch.where(infinite, want[1].double(), 0.0))
    found["lse"] = distance(got[1].masked_fill(infinite, 0), want[1].masked_fill(infinite, 0)) if same_places else math.inf
    return found | {f"gradient {n}": distance(a, b) for n, (a, b) in enumerate(zip(grads, expected, strict=True))}


def interpreted() -> list[Example]:
    """Those that Triton's interpreter, which is slow, runs in the tests."""
    return named(examples(), INTERPRETED)


def main() -> None:
    tell(interpreted(), lambda example: errors(example, "flash", torch.float32))


if __name__ == "__main__":
    sys.exit(main())
