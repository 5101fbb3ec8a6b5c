"""Sites whose exponentials nothing divides: product, row sums and row maxima; run as a script, in Triton's interpreter."""

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
    tell,
)
from lowering_sites import B as BATCHES
from sink_cases import float_mask, plan_text
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx.lowering.plan import Family
from attnfx.site import AttentionSite

INTERPRETED = ("plain", "causal", "keyless -1e4", "keyless min", "padded", "few queries, some keyless")
MASK = side(BATCH, KEYS, dtype=torch.bool)
BIAS = site().score + load(0, BATCHES, H, I, J)


def examples() -> Iterator[Example]:
    for name, s, loads in (
        ("plain", site(), None),
        ("causal", site(keep=causal(16)), None),
        ("keyless nan", site(keep=causal(-16)), None),
        ("keyless -1e4", site(keep=causal(-16), fill=-1e4, empty_rows="fill"), None),
        ("keyless min", site(keep=causal(-16), fill=MIN32, empty_rows="fill"), None),
        ("keyless min added", site(keep=causal(-16), fill=MIN32, additive=True, empty_rows="fill"), None),
        ("padded", site(keep=load(0, BATCHES, J, dtype=torch.bool), fill=MIN32, empty_rows="fill", side=(MASK,)),
         lambda dtype: (padding(True),)),
        ("mask of data", site(BIAS, side=(side(BATCH, HEADS, 37, KEYS),)),
         lambda dtype: (float_mask(dtype)[:, None].expand(BATCH, HEADS, 37, KEYS),)),
        ("learned bias", site(BIAS, side=(side(BATCH, HEADS, 37, KEYS, grad=True),)), random(BATCH, HEADS, 37, KEYS)),
        ("bias of rows", site(site().score + load(0, H, I), side=(side(HEADS, 37, grad=True),)), random(HEADS, 37)),
        ("few queries, some keyless", site(keep=causal(-3), fill=MIN32, empty_rows="fill", queries=7, keys=300), None),
    ):  # fmt: skip
        yield Example(name, s.replace(normaliser="max"), *([] if loads is None else [loads]))


def rows(s: AttentionSite, q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plain meaning: the product, and the sums and maxima of the rows."""
    out, lse = s.reference_lse(q, k, v, *loads)
    sums = s.reference(q, k, torch.ones_like(v), *loads)[..., 0]
    return out, sums, (lse - sums.log()).detach()


def errors(example: Example, family: Family, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Errors of the results and of every gradient against the float64 reference; NaNs must be in the same places."""
    given = [t.detach().to(device).requires_grad_(t.requires_grad) for t in (*inputs(example.site, dtype), *example.loads(dtype))]
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.dtype == dtype else t for t in given]
    q, k, v, *loads = given
    got = torch.ops.attnfx.attention_unnormalised(q, k, v, loads, [], plan_text(example.site, family))
    want = rows(example.site, *wide)
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape).to(t) for t in got[:2]]

    def loss(results: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.where(r.isfinite(), r * u, 0.0).sum() for r, u in zip(results, upstream, strict=False)]).sum()

    leaves = [(a, b) for a, b in zip(given, wide, strict=True) if a.requires_grad]
    grads = torch.autograd.grad(loss(got), [a for a, _ in leaves])
    expected = torch.autograd.grad(loss(want), [b for _, b in leaves])
    found = {name: _apart(a, b) for name, a, b in zip(("out", "sums"), got, want, strict=False)}
    finite = want[1].isfinite()
    found["maxima"] = distance(got[2][finite], want[2][finite])
    if bool(finite.all()):
        found |= {f"gradient {n}": distance(a, b) for n, (a, b) in enumerate(zip(grads, expected, strict=True))}
    return found


def _apart(a: Tensor, b: Tensor) -> float:
    return distance(a.nan_to_num(), b.nan_to_num()) if torch.equal(a.isnan(), b.isnan()) else math.inf


def main() -> None:
    tell(named(examples(), INTERPRETED), lambda example: errors(example, "flash", torch.float32))


if __name__ == "__main__":
    sys.exit(main())
