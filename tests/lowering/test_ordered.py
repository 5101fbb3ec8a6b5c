"""Tokens that are counted in an order of their own: every tier against float64, gradients, statistics, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import beyond, line
from lowering_sites import SCALED, distance
from order_cases import F16, IMAGE, UNEVEN, VIDEO, Case, cases, errors, operands, ordered_site
from sink_cases import plan_text
from torch._subclasses import FakeTensorMode

from attnfx.lowering import box_streams, codegen, ordered, vendor
from attnfx.lowering.configs import Config
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.sites.ordering import Order
from attnfx.sites.serialize import FormatError

TEXT = plan_text(ordered_site(UNEVEN), "portable")


@pytest.mark.parametrize("case", list(cases()), ids=lambda e: e.name)
def test_blocks_are_the_reference(case: Case) -> None:
    assert beyond(errors(case, "portable", torch.float64), 1e-11) == {}


@pytest.mark.interpreter
@pytest.mark.parametrize("case", list(cases()), ids=lambda e: e.name)
def test_kernels_are_the_reference(case: Case) -> None:
    found = line(Path(__file__).parent / "order_cases.py", case.name)
    assert beyond(found["errors"], 3e-5 if case.site.dtype == torch.float32 else 2e-3) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", list(cases()), ids=lambda e: e.name)
def test_kernels_on_a_gpu_are_the_reference(case: Case) -> None:
    dtype = case.site.dtype
    assert beyond(errors(case, "flash", dtype, "cuda"), 3e-5 if dtype == torch.float32 else 2e-3) == {}


@pytest.mark.parametrize("family", ["portable", "flash"])
def test_gradients_are_the_references(family: Any) -> None:
    site = ordered_site(UNEVEN, requires_grad=True)
    q, k, v = (t.double().requires_grad_() for t in operands(Case("", site), torch.float32))
    text = plan_text(site, family)
    out, want = torch.ops.attnfx.attention(q, k, v, [], [], text), site.reference(q, k, v)
    push = torch.randn_like(want)
    for mine, theirs in zip(*(torch.autograd.grad(x, (q, k, v), push) for x in (out, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_statistics_of_rows_stand_where_the_rows_lie() -> None:
    site = ordered_site(UNEVEN)
    q, k, v = operands(Case("", site), torch.float64)
    lse = torch.ops.attnfx.attention_lse(q, k, v, [], [], TEXT)[1]
    torch.testing.assert_close(lse, site.reference_lse(q, k, v)[1])
    undivided = plan_text(site.replace(normaliser="max"), "portable")
    out, sums, maxima = torch.ops.attnfx.attention_unnormalised(q, k, v, [], [], undivided)
    torch.testing.assert_close(sums.log() + maxima, lse)
    assert distance(out / sums[..., None], site.reference(q, k, v)) < 1e-11


def test_examples_may_be_mapped() -> None:
    site = ordered_site(UNEVEN)
    tensors = [torch.stack([t, -t]) for t in operands(Case("", site), torch.float64)]
    mapped = torch.vmap(lambda q, k, v: torch.ops.attnfx.attention(q, k, v, [], [], TEXT))(*tensors)
    for n in range(2):
        torch.testing.assert_close(mapped[n], site.reference(*(t[n] for t in tensors)))


def test_whether_a_kernel_reads_them_is_decided_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered.blocks, "kernels_run", lambda device: True)
    site = ordered_site(IMAGE, dtype=F16)
    with FakeTensorMode():
        q = torch.empty(2, 4, 1024, 16, dtype=F16)
        assert ordered.fused(plan_text(site, "flash"), q, [q])
        assert not ordered.fused(plan_text(site, "flash"), q, [q.requires_grad_()])
        assert not ordered.fused(plan_text(site, "portable"), q.detach(), [])
    assert not ordered.fused(plan_text(ordered_site(UNEVEN), "flash"), torch.empty(2, 4, 420, 16), [])


def test_another_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 419, 16)
    with pytest.raises(ValueError, match="419 queries and 419 keys; their order is one of 420 tokens"):
        torch.ops.attnfx.attention(q, q, q, [], [], TEXT)
    with monkeypatch.context() as kernels:  # also where a kernel would read them where they lie
        kernels.setattr(ordered.blocks, "kernels_run", lambda device: True)
        q = torch.randn(1, 4, 960, 16)
        with torch.no_grad(), pytest.raises(ValueError, match="960 queries and 960 keys; their order is one of 1024 tokens"):
            torch.ops.attnfx.attention(q, q, q, [], [], plan_text(ordered_site(IMAGE), "flash"))
    reasons = make_plan(ordered_site(UNEVEN).replace(order=IMAGE), "portable")
    assert not isinstance(reasons, KernelPlan)
    assert reasons == ("there are 420 queries and 420 keys; their order is one of 1024 tokens.",)
    assert any("an order of their own" in reason for reason in vendor.objections(ordered_site(UNEVEN)))


@pytest.mark.parametrize("value", [None, [], [[4], [0], [0]], [[2, 3], [0, 0]], [[2, 0], [0, 1]], [[2.0, 3], [0, 1]], [[], []]])
def test_an_order_that_is_none_is_refused(value: Any) -> None:
    data = json.loads(TEXT)
    data["site"]["order"] = value
    with pytest.raises(FormatError, match="order is"):
        KernelPlan.from_json(json.dumps(data))


def test_a_plan_keeps_its_order() -> None:
    assert KernelPlan.from_json(TEXT).site.order == UNEVEN
    assert KernelPlan.from_json(ordered.unordered(TEXT)).site.order is None


@pytest.mark.parametrize("order", [IMAGE, VIDEO, UNEVEN], ids=str)
def test_generated_places_are_those_of_the_order(order: Order) -> None:
    numbers = torch.arange(order.tokens)
    place = eval(f"lambda number: {codegen.placed(order)}")
    assert torch.equal(place(numbers), order.place(numbers))
    sides = box_streams.sides(order)
    if sides is None:
        return
    corner = eval(f"lambda b, h, number: ({codegen.corner(sides)})")
    firsts = range(0, order.tokens, 64)
    first, *rest = sides
    for number in firsts:
        *batch, head, a, b, zero = corner(3, 7, number)
        assert (head, zero) == (7, 0)
        along = [a, b] if len(sides) == 2 else [batch[0] - 3 * first.length, a, b]
        assert sum(x * s.step for x, s in zip(along, (first, *rest), strict=True)) == int(order.place(torch.tensor(number)))


def test_what_the_copy_engine_does_not_read_is_read_by_addresses() -> None:
    q = torch.empty(2, 1024, 4, 16, dtype=F16, device="meta").transpose(1, 2)
    tiles = Config(64, 64, 4, 2)
    found = box_streams.described("sm90", tiles, VIDEO, [q, q, q])
    assert found is not None
    assert [(d.shape, d.block_shape) for d in found] == [([16, 4, 16, 8, 16], [4, 1, 4, 4, 16])] * 3
    assert box_streams.described("sm80", tiles, VIDEO, [q, q, q]) is None
    assert box_streams.described("sm90", Config(128, 64, 4, 2), VIDEO, [q, q, q]) is None
    assert box_streams.described("sm90", Config(64, 64, 4, 2, tma=False), VIDEO, [q, q, q]) is None
    assert box_streams.described("sm90", tiles, VIDEO, [q, q.float(), q]) is None
    apart = torch.empty(2, 4, 1024, 16, dtype=F16, device="meta")  # the batch is no part of the first axis
    assert box_streams.described("sm90", tiles, VIDEO, [apart] * 3) is None
    assert box_streams.described("sm90", tiles, IMAGE, [apart] * 3) is not None


def test_a_site_tells_of_its_order() -> None:
    assert "i and j of 4x3x5x7 as 2, 0, 3, 1" in str(ordered_site(UNEVEN, score=SCALED))
