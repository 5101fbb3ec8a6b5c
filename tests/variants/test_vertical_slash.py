"""VerticalSlash: what it keeps in a case by hand, prefixes, tiles that it leaves out, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from variant_cases import SCALE, applied, site_of, tensors_of

from attnfx import expr
from attnfx.algebra.intervals import enclose
from attnfx.algebra.tiling import Tiling, kinds
from attnfx.composing import OnTensors
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants import VerticalSlash
from attnfx.variants.base import Example


@pytest.mark.parametrize("group", [1, 2])
def test_a_heavy_key_and_a_heavy_distance_are_kept(group: int) -> None:
    N, heads = 32, 4
    code = torch.eye(N + 1, dtype=torch.float64)
    k, q = code[:N].clone(), 30 * code[torch.arange(N) - 10]
    k[5] += code[N]
    q += 30 * code[N]  # each query sees key 5 and the key 10 before it, half and half
    torch.manual_seed(0)
    v = torch.randn(1, heads // group, N, 8, dtype=torch.float64)
    variant = VerticalSlash(vertical_size=1, slash_size=8, last_q=4, segment=16, sinks=0, local=1, block=4)
    site = site_of(Example(variant, N, N, key_heads=heads // group), torch.float64)
    site = site.replace(batch=sympy.Integer(1), head_dim=N + 1)
    q, k = q.expand(1, heads, N, N + 1), k.expand(1, heads // group, N, N + 1)
    out = variant.compose(OnTensors(site, (), q.device, "portable"), q, k, v)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    kept = (i < 16) | (j == 5) | (i // 4 - j // 4 < 4)  # distances 0 to 3, and 8 to 11: blocks 0 and 1, 2 and 3 apart
    z = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1)) * 0.25
    want = z.masked_fill(~(kept & (j <= i)), -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
    torch.testing.assert_close(out, want)


def test_a_longer_prompt_changes_nothing_of_its_beginning() -> None:
    variant = VerticalSlash(3, 8, 5, 12, 1, 3, 4)
    q, k, v = tensors_of(Example(variant, 37, 37), torch.float64)
    long = applied(Example(variant, 37, 37), q, k, v)
    for n in (11, 12, 13, 29):
        short = applied(Example(variant, n, n), q[:, :, :n], k[:, :, :n], v[:, :, :n])
        torch.testing.assert_close(short, long[:, :, :n], rtol=0, atol=1e-12)


def test_a_first_segment_and_the_last_queries_of_a_short_prompt_are_exact() -> None:
    for variant in (VerticalSlash(), VerticalSlash(1, 1, 40, 0, 0, 1)):
        example = Example(variant, 37, 37)
        tensors = tensors_of(example, torch.float64)
        torch.testing.assert_close(applied(example, *tensors), site_of(example, torch.float64).reference(*tensors))


class Spy(OnTensors):
    """Notes what is attended to."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[tuple[AttentionSite, Sequence[Tensor]]] = []

    def with_lse(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        self.seen.append((site, more))
        shape = (1, 4, query.shape[2])
        return torch.zeros(*shape, 8), torch.zeros(shape)


def tiles(variant: VerticalSlash, N: int) -> list[tuple[Tensor, Tensor]]:
    """(certainly kept, possibly kept) of the tiles of bands and of gathered keys."""
    example = Example(variant, N, N)
    site = site_of(example, torch.float32).replace(batch=sympy.Integer(1))
    q, k, v = (t[:1] for t in tensors_of(example, torch.float32))
    spy = Spy(site, (), q.device, "portable")
    variant.compose(spy, q, k, v)
    return [
        kinds(enclose(made.keep), Tiling(1, 4, N, int(made.keys), 128, 64), list(more), {}, q.device) for made, more in spy.seen
    ]


@pytest.mark.parametrize(("segment", "near", "far"), [(512, 0.37, 0.35), (0, 0.2, 1.0)])
def test_tiles_are_left_out(segment: int, near: float, far: float) -> None:
    N, variant = 2048, VerticalSlash(100, 128, 16, segment, 10, 64, 32)
    bands, gathered = (float(may.float().mean()) for _, may in tiles(variant, N))
    assert 0 < bands <= near  # of all, of which the causal ones are half
    assert 0 < gathered <= far
    site = site_of(Example(variant, N, N), torch.float32)
    assert bands * N * N <= float(variant.pairs(site)) * 1.5


def test_large_blocks_are_whole_tiles() -> None:
    must, may = tiles(VerticalSlash(100, 256, 16, 512, 10), 2048)[0]
    diagonal = torch.arange(32) // 2 == torch.arange(16)[:, None]
    assert torch.equal(must[:, :, ~diagonal], may[:, :, ~diagonal])
    assert not bool(may[:, :, 15].all())


def test_refusals() -> None:
    variant = VerticalSlash(3, 8, 5, 12, 1, 3, 4)
    example = Example(variant)
    site = site_of(example, torch.float32)
    assert variant.objections(site) == ()
    real = expr.Load(0, (expr.index("h"), expr.index("j")), torch.bool)
    padded = site.replace(keep=expr.logical_and(site.keep, real), side=(SideTensor((site.heads, site.keys), torch.bool),))
    for changed, words in (
        (padded, "not plainly causal"), (site_of(replace(example, causal=False), torch.float32), "is not causal"),
        (site.replace(score=expr.call("tanh", expr.Score())), "plain scores"), (site.replace(dropout=0.1), "dropout"),
        (site.replace(queries=sympy.Symbol("s0")), "numbers that are known"),
    ):  # fmt: skip
        assert any(words in sentence for sentence in variant.objections(changed)), words
    for parameters in ({"segment": 100}, {"segment": 32, "block": 32}, {"slash_size": 0}, {"block": 0}, {"vertical_size": 29}):
        with pytest.raises(PolicyError, match="VerticalSlash"):
            VerticalSlash(**parameters)


@pytest.mark.parametrize("segment", [12, 0])
def test_padding_takes_no_part_and_leaves_finite_numbers(segment: int) -> None:
    """The first sequence begins with a whole segment of padding, the second ends with some."""
    variant = VerticalSlash(3, 8, 5, segment, 1, 3, 4)
    example = Example(variant)
    side = SideTensor((sympy.Integer(2), sympy.Integer(37)), torch.bool)
    site = site_of(example, torch.float64)
    shown = expr.Load(0, (expr.index("b"), expr.index("j")), torch.bool)
    site = site.replace(keep=expr.logical_and(site.keep, shown), side=(side,), empty_rows="zero")
    assert variant.objections(site) == ()
    real = torch.ones(2, 37, dtype=torch.bool)
    real[0, :14], real[1, 33:] = False, False
    leaves = [t.requires_grad_() for t in tensors_of(example, torch.float64)]
    got = variant.compose(OnTensors(site, (real,), leaves[0].device, "portable"), *leaves)
    own = torch.stack(
        [torch.eye(37), torch.zeros(37, 37)]
    ).bool()  # of queries of the padding, whose rows of the oracle would have no number
    want = variant.reference(*leaves, SCALE, causal=True, keep=(real[:, None] | own)[:, None])
    mine, rows = (torch.cat([x[0, :, 14:].flatten(), x[1].flatten()]) for x in (got, want))
    torch.testing.assert_close(mine, rows, rtol=1e-7, atol=1e-7)
    assert not got[0, :, :14].any()
    grads = torch.autograd.grad(mine.square().sum(), leaves)
    for one, other in zip(grads, torch.autograd.grad(rows.square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_mask_that_tells_of_other_keys_is_refused() -> None:
    site = site_of(Example(VerticalSlash(3, 8, 5, 12, 1, 3, 4)), torch.float64)
    before = expr.Load(0, (expr.index("b"), expr.index("j") + expr.integer(1)), torch.bool)
    site = site.replace(
        keep=expr.logical_and(site.keep, before), side=(SideTensor((sympy.Integer(2), sympy.Integer(38)), torch.bool),)
    )
    assert "other keys than those it hides" in VerticalSlash(3, 8, 5, 12, 1, 3, 4).objections(site)[0]


def test_a_decode_step_of_any_length_attends_to_all() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    variant = VerticalSlash(3, 8, 5, 12, 1, 3, 4)
    example = Example(variant, 1, 37, causal=False)
    site = site_of(example, torch.float64).replace(keys=size)
    assert variant.objections(site) == ()
    q, k, v = tensors_of(example, torch.float64)
    got = variant.compose(OnTensors(site, (), q.device, "portable", {size: 37}), q, k, v)
    torch.testing.assert_close(got, variant.reference(q, k, v, SCALE, causal=True))
