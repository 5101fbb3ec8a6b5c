"""Neighbourhoods by the published formula of their windows, element by element; their order, their tiles and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from variant_cases import site_of, tensors_of

from attnfx.algebra.intervals import enclose
from attnfx.algebra.tiling import Tiling, kinds
from attnfx.composing import OnTensors
from attnfx.errors import PolicyError
from attnfx.variants import NeighborhoodAttention, boxed, boxes
from attnfx.variants.base import Example


def window(x: int, length: int, size: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """Coordinates that x sees: the leader of its run of ``stride``, whose window is shifted inside of the axis."""
    g, p = x % dilation, x // dilation
    inner = length // dilation + (1 if g < length % dilation else 0)
    left, right = size // 2, size // 2 + size % 2 - 1
    if causal:
        leader = min(p // stride * stride + stride - 1, inner - 1)
        begin, end = max(leader - left - right, 0), min(p + 1, inner)
    else:
        leader = min(p // stride * stride + stride // 2, inner - 1)
        begin = max(leader - left, 0) + (inner - right - leader - 1 if leader + right >= inner else 0)
        end = begin + size
    return {n * dilation + g for n in range(begin, end)}


AXES = [
    (length, size, stride, dilation, causal)
    for length, size, dilation, causal in itertools.product((1, 5, 8, 11), (1, 2, 3, 5), (1, 2, 3), (False, True))
    for stride in range(1, size + 1)
    if size * dilation <= length
]


@pytest.mark.parametrize(("length", "size", "stride", "dilation", "causal"), AXES)
def test_an_axis_is_the_formula(length: int, size: int, stride: int, dilation: int, causal: bool) -> None:
    (axis,) = NeighborhoodAttention((length,), size, stride, dilation, causal).seen().axes
    assert sorted(axis.place) == list(range(length))
    for x in range(length):
        seen = {y for y in range(length) if axis.low[x] <= axis.place[y] <= axis.high[x]}
        assert seen == window(x, length, size, stride, dilation, causal)
        assert x in seen


def seen_by(variant: NeighborhoodAttention, tokens: int) -> torch.Tensor:
    """(N, N): which keys have weight, by values that are the identity."""
    example = Example(variant, tokens, tokens, causal=False, key_heads=1)
    q, k, _ = (t[:1] for t in tensors_of(example, torch.float64))
    site = site_of(example, torch.float64).replace(value_dim=tokens)
    value = torch.eye(tokens, dtype=torch.float64)[None, None]
    return variant.compose(OnTensors(site, (), q.device, "portable"), q, k, value)[0, 0] > 0


def test_a_small_image_by_hand() -> None:
    seen = seen_by(NeighborhoodAttention((3, 4), (2, 3)), 12).view(3, 4, 3, 4)
    # the even window reaches to the row above; at the first row it is moved inside
    assert seen[0, 0].nonzero().tolist() == [[r, c] for r in (0, 1) for c in (0, 1, 2)]
    assert seen[1, 1].nonzero().tolist() == [[r, c] for r in (0, 1) for c in (0, 1, 2)]
    assert seen[2, 3].nonzero().tolist() == [[r, c] for r in (1, 2) for c in (1, 2, 3)]


@pytest.mark.parametrize("first", [False, True])
def test_further_tokens_see_all_and_are_seen_by_all(first: bool) -> None:
    seen = seen_by(NeighborhoodAttention((4, 4), 3, extra=2, extra_first=first), 18)
    further = slice(0, 2) if first else slice(16, 18)
    assert seen[further].all()
    assert seen[:, further].all()
    assert seen.sum() == 2 * 18 + 16 * (9 + 2)


@pytest.mark.parametrize("tile", [(2, 4), (4, 2), (1, 1), (3, 5)])
def test_every_order_is_undone(tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    variant = NeighborhoodAttention((4, 16), (3, 5), dilation=(1, 2), extra=3, extra_first=True)
    boxed._arranged.cache_clear()
    monkeypatch.setattr(boxes.Boxes, "tile", lambda self, ranges: tile)
    example = Example(variant, 67, 67, causal=False)
    q, k, v = tensors_of(example, torch.float64)
    got = variant.compose(OnTensors(site_of(example, torch.float64), (), q.device, "portable"), q, k, v)
    boxed._arranged.cache_clear()
    torch.testing.assert_close(got, variant.reference(q, k, v, 0.25))


@pytest.mark.parametrize(
    ("variant", "empty"),
    [
        (NeighborhoodAttention((64, 64), 13), 0.84),
        (NeighborhoodAttention((64, 64), 7, dilation=4), 0.94),
        (NeighborhoodAttention((13, 24, 40), (5, 7, 7), extra=77, extra_first=True), 0.84),
    ],
)
def test_most_tiles_are_proved_to_be_empty(variant: NeighborhoodAttention, empty: float) -> None:
    """And fewer in the order of rows."""
    tokens = variant.seen().cells + variant.extra
    found = []
    for free in (True, False):
        made = boxed._arranged(variant.seen(), free, ranges=False)
        keep = boxed.visible(made, 0, free)
        may = kinds(enclose(keep), Tiling(1, 1, tokens, tokens, 128, 64), [made.table], {}, made.table.device)[1]
        found.append(1 - float(may.float().mean()))
    assert found[0] >= empty > found[1]


def test_the_tokens_of_a_site_are_counted() -> None:
    variant = NeighborhoodAttention((5, 7), 3, extra=2)
    (sentence,) = variant.objections(site_of(Example(variant, 36, 37), torch.float32))
    assert sentence == (
        "There are 36 queries and 37 keys; the layout 5 x 7 and 2 further tokens has 37 tokens, and needs as many of both."
    )


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"layout": (5, 0)}, "layout is (5, 0); it must be 1 or 2 or 3 whole numbers of at least 1."),
        ({"layout": (2, 2, 2, 2)}, "layout is (2, 2, 2, 2)"),
        ({"kernel_size": 0}, "kernel_size is 0; it must be whole numbers from 1 on."),
        ({"kernel_size": (3, 3, 3)}, "kernel_size is (3, 3, 3); it must be one number, or 2 of them."),
        ({"dilation": 2}, "kernel_size is 3 and dilation 2 on an axis of 5 tokens"),
        ({"stride": 4}, "stride is 4; it must be at most kernel_size, which is 3."),
        ({"is_causal": 1}, "is_causal is 1"),
        ({"extra": -1}, "extra is -1; it must be a whole number of at least 0."),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError) as error:
        NeighborhoodAttention(**({"layout": (5, 7), "kernel_size": 3} | parameters))
    assert f"NeighborhoodAttention.{complaint}" in str(error.value)
