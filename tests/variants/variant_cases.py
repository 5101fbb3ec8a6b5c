"""The examples of all variants as sites with tensors, and what a variant's composition gives on them."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import Tensor

from attnfx import expr, variants
from attnfx.composing import OnTensors
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants.base import Example

HEADS, WIDTH, VALUE_WIDTH, BATCH, SCALE = 4, 16, 8, 2, 0.25

#: Each example of each variant by a name that says what it is.
EXAMPLES: dict[str, Example] = {
    f"{example.variant}, {example.queries} x {example.keys}{' causal' if example.causal else ''}, {example.key_heads}": example
    for variant in variants.all().values()
    for example in variant.examples()
}


def site_of(example: Example, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = False) -> AttentionSite:
    keep: Expr = expr.TRUE
    if example.causal:
        keep = expr.le(expr.index("j"), expr.index("i") + expr.integer(example.keys - example.queries))
    sizes = [sympy.Integer(n) for n in (BATCH, HEADS, example.key_heads, example.queries, example.keys)]
    score = expr.Score() * SCALE
    return AttentionSite(*sizes, WIDTH, VALUE_WIDTH, dtype, device, score, keep=keep, requires_grad=requires_grad)


def tensors_of(example: Example, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    keys = (BATCH, example.key_heads, example.keys)
    shapes = (BATCH, HEADS, example.queries, WIDTH), (*keys, WIDTH), (*keys, VALUE_WIDTH)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def applied(example: Example, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the variant's own composition gives, by the family of the device."""
    from attnfx.decide import family

    site = site_of(example, q.dtype, q.device.type, q.requires_grad)
    objections = example.variant.objections(site)
    assert objections == (), objections
    return example.variant.compose(OnTensors(site, (), q.device, family(site)), q, k, v)


def oracle(example: Example, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return example.variant.reference(q, k, v, SCALE, causal=example.causal)


def grouped_apart(example: Example) -> Example:
    """With as many key heads as query heads."""
    return replace(example, key_heads=HEADS)
