"""Pages gathered for a single query: each page once, the same keys that a table of pages keeps, and nothing else that is read."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor
from variant_cases import BATCH, SCALE, site_of, tensors_of

from attnfx import expr
from attnfx.composing import OnTensors
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants import BlockTopK, gathered, standing
from attnfx.variants.base import Example

REAL = expr.Load(0, (expr.index("b"), expr.index("j")), torch.bool)


def run(variant: BlockTopK, site: AttentionSite, loads: tuple[Tensor, ...], *operands: Tensor) -> Tensor:
    return variant.compose(OnTensors(site, loads, operands[0].device, "portable"), *operands)


def taken(variant: BlockTopK, site: AttentionSite) -> bool:
    pages = gathered.count(variant.top, variant.page, variant.sinks, variant.window)
    return gathered.possible(site, pages * variant.page)


@pytest.mark.parametrize("keys", [112, 113, 127])
@pytest.mark.parametrize("sinks", [0, 1, 9])
@pytest.mark.parametrize("window", [0, 1, 8, 13])
def test_each_page_counts_once(keys: int, sinks: int, window: int) -> None:
    """The best pages are wanted from where the first keys and the last ones are as well."""
    variant = BlockTopK(2, 8, sinks, window)
    site = site_of(Example(variant, 1, keys), torch.float64)
    assert taken(variant, site)
    for best in (0, keys // 2, keys - 1):
        q, k, v = tensors_of(Example(variant, 1, keys), torch.float64)
        q, k = q.abs(), k * 0.1
        k[:, :, max(0, best - 6) : best + 6] += 0.3
        got = run(variant, site, (), q, k, v)
        torch.testing.assert_close(got, variant.reference(q, k, v, SCALE, causal=True), rtol=1e-9, atol=1e-9)


def test_nothing_else_is_read() -> None:
    variant, keys = BlockTopK(1, 8, sinks=0), 96
    q, k, v = tensors_of(Example(variant, 1, keys), torch.float64)
    q, k = q.abs(), k * 0.1
    k[:, :, 40:48] += 2.0  # the best page
    v[:, :, :40], v[:, :, 48:88] = float("nan"), float("nan")  # but for the page that the query stands in
    assert not run(variant, site_of(Example(variant, 1, keys), torch.float64), (), q, k, v).isnan().any()


@pytest.mark.parametrize("empty_rows", ["zero", "nan"])
def test_padding_is_gathered_with_the_keys(empty_rows: str) -> None:
    """In an odd place, over all pages that are chosen, and over everything."""
    variant, keys = BlockTopK(1, 8, sinks=1), 96
    site = site_of(Example(variant, 1, keys), torch.float64)
    side = (SideTensor((site.batch, site.keys), torch.bool),)
    site = site.replace(keep=expr.logical_and(site.keep, REAL), side=side, empty_rows=empty_rows)
    assert taken(variant, site)
    q, k, v = tensors_of(Example(variant, 1, keys), torch.float64)
    for hidden in (slice(3, 90), slice(0, 8), slice(0, keys)):
        real = torch.ones(BATCH, keys, dtype=torch.bool)
        real[1, hidden] = False
        want = variant.reference(q, k, v, SCALE, causal=True, keep=real[:, None, None])
        got = run(variant, site, (real,), q, k, v)
        torch.testing.assert_close(got, want if empty_rows == "nan" else want.nan_to_num(), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_what_stays_a_mask() -> None:
    variant, plain = BlockTopK(1, 8, sinks=1), site_of(Example(BlockTopK(), 1, 96), torch.float64)
    assert taken(variant, plain)
    assert taken(variant, plain.replace(keep=expr.TRUE))
    padded = plain.replace(keep=REAL, side=(SideTensor((plain.batch, plain.keys), torch.bool),))
    stood = standing.stood(padded)
    assert stood is not None
    assert taken(variant, stood)
    for site in (
        plain.replace(queries=sympy.Integer(2)), plain.replace(keys=sympy.Integer(40)), plain.replace(dropout=0.1),
        plain.replace(score=expr.Score() + expr.cast(expr.index("j"), torch.float32)),
        stood.replace(fill=-1e9, empty_rows="fill"), stood.replace(additive=True),
    ):  # fmt: skip
        assert not taken(variant, site)
