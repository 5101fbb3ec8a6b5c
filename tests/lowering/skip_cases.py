"""Sites that leave out tiles by their scores; run as a script, those of INTERPRETED in Triton's interpreter."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lowering_sites import (
    MIN32,
    SCALED,
    B,
    Example,
    H,
    I,
    J,
    alibi,
    causal,
    distance,
    inputs,
    load,
    named,
    random,
    side,
    site,
    tell,
    window,
)  # fmt: skip
from sink_cases import plan_text
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.lowering.plan import Family
from attnfx.site import AttentionSite
from attnfx.sites.skipping import Skip, left_out

SKIP = Skip(0.05, None, 16, 16)
STEP = replace(SKIP, chunk=64)
#: Queries, and keys, of a prefill; the last tiles are parts.
QUERIES, KEYS = 70, 170
INTERPRETED = (
    "causal", "window", "padded, rows of nothing but fills", "step", "step, padded", "alibi, 32 x 16", "rows without keys, zero",
)  # fmt: skip


def skipping(skip: Skip = SKIP, queries: int = QUERIES, keys: int = KEYS, **others: Any) -> AttentionSite:
    return site(queries=queries, keys=keys, requires_grad=False, **others).replace(skip=skip)


def examples() -> Iterator[Example]:
    ahead = KEYS - QUERIES
    yield Example("full", skipping())
    yield Example("causal", skipping(keep=causal(ahead)))
    yield Example("by the length", skipping(Skip(0.9, 0.05 * KEYS, 16, 16), keep=causal(ahead)))
    yield Example("causal, 16 x 64", skipping(Skip(0.05, None, 16, 64), keep=causal(ahead)))
    yield Example("window", skipping(keep=expr.logical_and(window(90), causal(20))))
    yield Example("rows without keys, zero", skipping(keep=causal(-20), empty_rows="zero"))
    yield Example("rows without keys, nan", skipping(keep=causal(-20)))
    hidden = {"keep": expr.logical_and(causal(ahead), load(0, B, J, dtype=torch.bool)), "side": (side(2, KEYS, dtype=torch.bool),)}
    yield Example("padded, rows of nothing but fills", skipping(fill=MIN32, empty_rows="fill", **hidden), padded)
    yield Example("padded, finfo.min added", skipping(fill=MIN32, additive=True, empty_rows="fill", **hidden), padded)
    slopes = {"score": alibi(), "keep": causal(ahead), "side": (side(4),)}
    yield Example("alibi, 32 x 16", skipping(Skip(0.05, None, 32, 16), **slopes), lambda dtype: (torch.rand(4, dtype=dtype) / 50,))
    bias = {"score": SCALED + load(0, H, I, J), "side": (side(4, QUERIES, KEYS),)}
    yield Example("bias", skipping(**bias), random(4, QUERIES, KEYS, grad=False))
    sink = {"keep": causal(ahead), "sink": load(0, H), "side": (side(4),)}
    yield Example("sink", skipping(**sink), random(4, grad=False))
    yield Example("wide", skipping(keep=causal(ahead), head_dim=80, value_dim=24))
    yield Example("step", skipping(STEP, 1, keep=causal(KEYS - 1)))
    yield Example("step of five", skipping(STEP, 5, keep=causal(KEYS - 5)))
    yield Example("step, 32 in runs of 96", skipping(Skip(0.05, None, 32, 32, 96), 1))
    yield Example("step, padded", skipping(STEP, 1, **{**hidden, "keep": load(0, B, J, dtype=torch.bool)}), padded)
    yield Example("step, window", skipping(STEP, 1, keep=expr.lt(expr.integer(100), J)))


def padded(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """bool (2, KEYS): the first batch begins with padding, so that its first queries keep nothing."""
    keep = torch.ones(2, KEYS, dtype=torch.bool)
    keep[0, :110] = False
    return (keep,)


def operands(s: AttentionSite, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; of four tiles of keys one is six times as long, the others a twentieth: nothing is decided narrowly."""
    assert s.skip is not None
    q, k, v = (t.detach() for t in inputs(s, dtype))
    strong = torch.arange(k.shape[2]) // s.skip.keys % 4 == 1
    return q, k * torch.where(strong, 6.0, 0.05).to(dtype)[:, None], v


def share(s: AttentionSite, q: Tensor, k: Tensor, *loads: Tensor) -> float:
    """Of the kept pairs those that are left out, where the scores are the scaled dots."""
    assert s.skip is not None
    group = q.shape[1] // k.shape[1]
    values = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    kept = s.replace(skip=None, value_dim=k.shape[2]).reference(q, k, values, *loads) > 0
    z = (q @ k.repeat_interleave(group, 1).mT * 0.25).masked_fill(~kept, -math.inf)
    return float((left_out(s.skip, z, k.shape[2], group) & kept).sum() / kept.sum())


def errors(example: Example, family: Family, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Errors of O and the LSE against float64; infinite where values that are not finite differ."""
    given = [t.to(device) for t in (*operands(example.site, dtype), *(t.detach() for t in example.loads(dtype)))]
    q, k, v, *loads = given
    out, lse = torch.ops.attnfx.attention_lse(q, k, v, loads, [], plan_text(example.site, family))
    want = example.site.reference_lse(*(t.double() if t.dtype == dtype else t for t in given))
    same = torch.equal(lse.isinf(), want[1].isinf())
    finite = distance(lse.masked_fill(lse.isinf(), 0), want[1].masked_fill(want[1].isinf(), 0))
    return {"out": distance(out, want[0]), "lse": finite if same else math.inf}


def interpreted() -> list[Example]:
    """Those that Triton's interpreter, which is slow, runs in the tests."""
    return named(examples(), INTERPRETED)


def main() -> None:
    tell(interpreted(), lambda example: errors(example, "flash", torch.float32))


if __name__ == "__main__":
    sys.exit(main())
