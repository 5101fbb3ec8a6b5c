"""Sites whose tokens are counted in an order of their own; run as a script, all of them in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lowering_sites import SCALED, B, Example, H, I, J, distance, load, side, site, softcap, tell, window
from sink_cases import plan_text
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.lowering import box_streams, ordered
from attnfx.lowering.plan import Family
from attnfx.sites.ordering import Order

IMAGE = Order((4, 8, 4, 8), (0, 2, 1, 3))
VIDEO = Order((2, 4, 4, 4, 2, 4), (0, 2, 4, 1, 3, 5))
#: No whole number of tiles of 16.
UNEVEN = Order((4, 3, 5, 7), (2, 0, 3, 1))
F16 = torch.float16


@dataclass(frozen=True)
class Case(Example):
    """``heads_last``: as a projection lays tokens out; ``streams``: whether a kernel of Hopper reads boxes."""

    heads_last: bool = True
    streams: bool = False


def cases() -> Iterator[Case]:
    near = window(100)
    yield Case("image", ordered_site(IMAGE, near))
    yield Case("image, half", ordered_site(IMAGE, near, dtype=F16), streams=True)
    yield Case("image, heads first", ordered_site(IMAGE, near, dtype=F16), heads_last=False, streams=True)
    for width in (80, 128):
        yield Case(f"image, {width} wide", ordered_site(IMAGE, near, dtype=F16, head_dim=width, value_dim=width), streams=True)
    yield Case("image, full", ordered_site(IMAGE, dtype=F16), streams=True)
    yield Case("image, softcap", ordered_site(IMAGE, near, score=softcap()))
    ids = expr.eq(*(load(0, B, x, dtype=torch.int64) for x in (I, J)))
    documents = {"side": (side(2, 1024, dtype=torch.int64),), "empty_rows": "zero", "dtype": F16}
    yield Case("image, by lists", ordered_site(IMAGE, ids, **documents), numbers, streams=True)
    yield Case("video", ordered_site(VIDEO, near))
    yield Case("video, half", ordered_site(VIDEO, near, dtype=F16), streams=True)
    yield Case("video, one", ordered_site(VIDEO, near, dtype=F16, batch=1), heads_last=False, streams=True)
    yield Case("video, heads first", ordered_site(VIDEO, near, dtype=F16), heads_last=False)
    yield Case("uneven", ordered_site(UNEVEN, near))
    sink = {"sink": load(0, H), "side": (side(4),)}
    yield Case("uneven, sink", ordered_site(UNEVEN, near, **sink), lambda dtype: (torch.linspace(-1, 1, 4, dtype=dtype),))


def ordered_site(order: Order, keep: Any = expr.TRUE, score: Any = SCALED, **changes: Any) -> Any:
    values = {"queries": order.tokens, "keys": order.tokens, "requires_grad": False, "heads": 4, **changes}
    return site(score, keep, **values).replace(order=order)


def numbers(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Documents of 300 tokens, as they are counted, int64 (2, 1024)."""
    return ((torch.arange(1024) // 300).expand(2, -1).contiguous(),)


def operands(case: Case, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    s = case.site
    found = []
    for heads, width in ((s.heads, s.head_dim), (s.key_heads, s.head_dim), (s.key_heads, s.value_dim)):
        shape = [int(s.batch), int(s.queries), int(heads), width]
        x = torch.randn(shape, dtype=dtype)
        found.append(x.transpose(1, 2) if case.heads_last else x.transpose(1, 2).contiguous())
    return found


def errors(case: Case, family: Family, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """The distance of O from float64, and whether a kernel read the tokens where, and as, it was said."""
    tensors = [t.to(device) for t in operands(case, dtype)]
    loads = [t.to(device) for t in case.loads(dtype)]
    text = plan_text(case.site, family)
    with torch.no_grad():
        out = torch.ops.attnfx.attention(*tensors, loads, [], text)
        want = case.site.reference(*(t.double() for t in tensors), *(t.double() if t.is_floating_point() else t for t in loads))
    found = {"out": distance(out, want)}
    if family == "flash":
        fused = ordered.fused(text, tensors[0], tensors)
        found["fused"] = float(fused != (case.site.order is not UNEVEN))
    return found


def watched(case: Case) -> dict[str, float]:
    """:func:`errors` of the kernels, and whether they read boxes where that was said."""
    seen: list[bool] = []
    described = box_streams.described

    def told(*args: Any) -> Any:
        found = described(*args)
        seen.append(found is not None)
        return found

    box_streams.described = told
    try:
        found = errors(case, "flash", case.site.dtype)
    finally:
        box_streams.described = described
    return found | {"streams": float((seen == [True]) != case.streams)}


def main() -> None:
    tell(list(cases()), watched)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
