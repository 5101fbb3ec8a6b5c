"""Sites with biases that plans have in different forms, and tensors for them."""

from typing import Any

import torch
from lowering_sites import HEADS, KEYS, QUERIES, SCALED, B, Example, H, I, J, alibi, causal, load, side, site, t5
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr
from attnfx.site import AttentionSite

F32 = torch.float32
POINTS = side(2, KEYS, 3)


def real(e: Expr) -> Expr:
    return expr.cast(e, F32)


def away(dimensions: int) -> Expr:
    total = None
    for n in range(dimensions):
        one = expr.call("pow", load(1, B, I, expr.integer(n)) - load(1, B, J, expr.integer(n)), expr.integer(2))
        total = one if total is None else total + one
    assert total is not None
    return load(0, H) * total


COSINE = load(0, H) * expr.call("cos", real(I - J) * 0.25)
SYMMETRIC = load(0, H) * real(expr.call("abs", I - J))
SLOPES, LEARNED = side(HEADS), side(HEADS, grad=True)
PLACES = side(QUERIES, KEYS, dtype=torch.int64)
WINDOW = load(0, load(1, I, J, dtype=torch.int64), H)
SMALL: dict[str, Any] = {"batch": 16, "side": (side(9, HEADS, grad=True), PLACES)}
CASES: dict[str, tuple[AttentionSite, tuple[str, ...]]] = {
    "alibi": (site(alibi(), causal(), side=(SLOPES,)), ("key",)),
    "alibi, learned": (site(alibi(), causal(), side=(LEARNED,)), ("key",)),
    "alibi of half precision, learned": (site(alibi(), causal(), side=(LEARNED,), dtype=torch.bfloat16), ("distance",)),
    "alibi of half precision": (site(alibi(), side=(SLOPES,), queries=6000, keys=6000, dtype=torch.bfloat16), ("key",)),
    "alibi too long for float32": (site(alibi(), side=(SLOPES,), queries=6000, keys=6000), ("formula",)),
    "alibi of half precision, too long": (
        site(alibi(), side=(SLOPES,), queries=9000, keys=9000, dtype=torch.bfloat16),
        ("formula",),
    ),
    "symmetric": (site(SCALED + SYMMETRIC, side=(SLOPES,)), ("formula",)),
    "symmetric, learned": (site(SCALED + SYMMETRIC, side=(LEARNED,)), ("distance",)),
    "sinusoid": (site(SCALED + COSINE, side=(SLOPES,)), ("products",)),
    "sinusoid, learned": (site(SCALED + COSINE, side=(LEARNED,)), ("distance",)),
    "t5": (site(t5(), side=(side(32, HEADS),)), ("distance",)),
    "points": (site(SCALED + away(3), side=(SLOPES, POINTS)), ("formula",)),
    "window": (site(SCALED + WINDOW, **SMALL), ("tile",)),
    "table of a long row": (site(SCALED + WINDOW, side=(side(9, HEADS), PLACES)), ("formula",)),
    "data": (site(SCALED + load(0, H, I, J) + load(1, B, J), side=(side(HEADS, QUERIES, KEYS), side(2, KEYS))), ("data", "data")),
    "rounded": (site(SCALED + real(expr.cast(load(0, H) * real(J - I), torch.bfloat16)), side=(SLOPES,)), ("distance",)),
}


def loads_of(s: AttentionSite, dtype: torch.dtype) -> list[Tensor]:
    made = []
    for t in s.side:
        shape = [int(n) for n in t.shape]
        values = torch.randint(0, 9, shape) if t.dtype == torch.int64 else torch.randn(shape, dtype=dtype) * 0.3
        made.append(values.requires_grad_(t.requires_grad))
    return made


def examples() -> list[Example]:
    """Forms for the kernels in Triton's interpreter."""
    names = ("alibi, learned", "sinusoid", "window")
    return [Example(f"form {n}", CASES[n][0], lambda dtype, s=CASES[n][0]: loads_of(s, dtype)) for n in names]
