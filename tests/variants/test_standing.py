"""A single query whose mask is data stands at the last key that the mask shows it: padding, a cache that is filled, `generate`."""

from __future__ import annotations

import pytest
import sympy
import torch
from generating import generated
from variant_cases import BATCH, SCALE, site_of, tensors_of

from attnfx import expr
from attnfx.composing import Composition, OnTensors, composed
from attnfx.expr import Expr
from attnfx.site import AttentionSite, Origin, SideTensor
from attnfx.variants import (
    AShape,
    BlockTopK,
    DilatedWindow,
    HierarchicalTopK,
    LinearAttention,
    PerHead,
    PerHeadSpans,
    PooledBlocks,
    Sharded,
    SlidingWindow,
    StreamingHeads,
    Strided,
    Temperature,
    standing,
)
from attnfx.variants.base import Example, Variant

N, FILLED = 37, 30
B, J = expr.index("b"), expr.index("j")
VARIANTS = (
    SlidingWindow(5), SlidingWindow(5, sinks=2), StreamingHeads((0.9, 0.1), sinks=2, recent=6), AShape(3, 6), Strided(4),
    DilatedWindow(4), Temperature(0.1), Sharded(4, 2, 4), PerHead({"0-1": SlidingWindow(5)}),
    PerHeadSpans((8, 9), (0.0, 0.0), block=1),
)  # fmt: skip
CHOSEN = (BlockTopK(2, 4), BlockTopK(1, 5, sinks=0, window=6), PooledBlocks(2, 4), HierarchicalTopK(8, 4, 4, 1, 3))


def masked(mask: Expr, *side: SideTensor, keys: sympy.Expr | int = N) -> AttentionSite:
    site = site_of(Example(SlidingWindow(1), 1, N, causal=False), torch.float64).replace(keys=sympy.sympify(keys))
    return site.replace(keep=mask, side=side, empty_rows="zero")


def bools(*indices: Expr) -> Expr:
    return expr.Load(0, indices, torch.bool)


PLAIN = masked(bools(B, expr.integer(0), J), SideTensor((sympy.Integer(BATCH), sympy.Integer(1), sympy.Integer(N)), torch.bool))


@pytest.mark.parametrize("variant", [*VARIANTS, *CHOSEN], ids=repr)
def test_padding_in_front_and_a_cache_that_is_not_full(variant: Variant) -> None:
    """The first sequence is padded by four tokens, the cache of the second is filled up to 30 keys."""
    real = torch.ones(BATCH, 1, N, dtype=torch.bool)
    real[0, :, :4], real[1, :, FILLED:] = False, False
    q, k, v = tensors_of(Example(variant, 1, N), torch.float64)
    stood = standing.stood(PLAIN)
    assert stood is not None
    assert variant.objections(PLAIN)
    assert variant.objections(stood) == ()
    got = Composition(variant, "portable", (), stood).compose(OnTensors(PLAIN, (real,), q.device, "portable"), q, k, v)
    padded = variant.reference(q[:1], k[:1], v[:1], SCALE, causal=True, keep=real[:1, None])
    shorter = variant.reference(q[1:], k[1:, :, :FILLED], v[1:, :, :FILLED], SCALE, causal=True)
    torch.testing.assert_close(got, torch.cat([padded, shorter]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", CHOSEN[:3], ids=repr)
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_are_chosen_among_keys_whose_number_changes(variant: Variant, padded: bool) -> None:
    """Fewer blocks than are to be chosen among them: one compile serves all lengths."""
    size = sympy.Symbol("s0", integer=True, positive=True)
    mask, side = bools(B, expr.integer(0), J), SideTensor((sympy.Integer(BATCH), sympy.Integer(1), size), torch.bool)
    plain = masked(mask, side, keys=size) if padded else masked(expr.TRUE, keys=size)
    plain = plain.replace(ranges_low=((size, sympy.Integer(2)),))
    made = composed(variant, plain, "portable", standing.stood(plain))
    assert isinstance(made, Composition)
    for length in (3, 9, N):
        q, k, v = tensors_of(Example(variant, 1, length), torch.float64)
        real = [torch.ones(BATCH, 1, length, dtype=torch.bool)] if padded else []
        got = made.compose(OnTensors(plain, real, q.device, "portable", {size: length}), q, k, v)
        torch.testing.assert_close(got, variant.reference(q, k, v, SCALE, causal=True), rtol=1e-8, atol=1e-8)


def test_masks_are_read_in_other_spellings() -> None:
    """A mask of numbers, of all sequences at once, with a limit of its own: 4 <= j and not (mask[j] == 0)."""
    mask = expr.logical_and(
        expr.ne(expr.Load(0, (J + expr.integer(0),), torch.int64), expr.integer(0)), expr.le(expr.integer(4), J)
    )
    site, variant = masked(mask, SideTensor((sympy.Integer(N),), torch.int64)), SlidingWindow(5)
    stood = standing.stood(site)
    assert stood is not None
    q, k, v = tensors_of(Example(variant, 1, N), torch.float64)
    numbers = (torch.arange(N) < FILLED).long() * 7
    got = Composition(variant, "portable", (), stood).compose(OnTensors(site, (numbers,), q.device, "portable"), q, k, v)
    want = variant.reference(q, k[:, :, :FILLED], v[:, :, :FILLED], SCALE, causal=True)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "site",
    [
        PLAIN.replace(queries=sympy.Integer(2)), PLAIN.replace(keep=expr.TRUE), PLAIN.replace(origin=Origin(relation="cross")),
        PLAIN.replace(keep=bools(expr.index("h"), expr.integer(0), J)),
        PLAIN.replace(keep=expr.lt(expr.call("exp", expr.cast(J, torch.float32)), expr.lift(2.0))),
    ],
    ids=["two queries", "no mask", "cross attention", "a mask for each head", "an operation that is not computed"],
)  # fmt: skip
def test_what_has_no_place(site: AttentionSite) -> None:
    assert standing.stood(site) is None


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 53, (2, 19), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@pytest.fixture(scope="module")
def dense(prompts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return generated(None, *prompts)[0]


@pytest.mark.parametrize(
    "variant", [SlidingWindow(6, sinks=1), BlockTopK(2, 3, sinks=1, query_block=1), LinearAttention()], ids=repr
)
def test_steps_of_generate_are_a_prefill_of_all_tokens(
    variant: Variant, prompts: tuple[torch.Tensor, torch.Tensor], dense: torch.Tensor
) -> None:
    ids, mask = prompts
    steps, reports = generated(variant, ids, mask)
    assert len(reports) == 3  # a prefill, a step, and a step of any length
    assert all(type(site.variant) is type(variant) for report in reports for site in report.sites)
    tokens = torch.cat([ids, steps.argmax(-1).T], 1)
    longer = torch.cat([mask, torch.ones(2, steps.shape[0], dtype=mask.dtype)], 1)
    whole, _ = generated(variant, tokens[:, :-1], longer[:, :-1], tokens=1)
    torch.testing.assert_close(steps[-1], whole[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense[-1], steps[-1], atol=1e-2)


def test_a_cache_of_a_fixed_length_is_no_longer_than_it_is_filled(
    prompts: tuple[torch.Tensor, torch.Tensor], dense: torch.Tensor
) -> None:
    steps, reports = generated(SlidingWindow(6, sinks=1), *prompts, tokens=2, cache_implementation="static", disable_compile=True)
    assert [type(report.sites[0].variant) for report in reports] == [type(None), SlidingWindow]
    torch.testing.assert_close(steps[0], dense[0], rtol=1e-4, atol=1e-4)  # the mask of its prefill is data, and stays
    assert not torch.allclose(steps[1], dense[1], atol=1e-2)
