"""Variants of images, videos and windows: what parameters they refuse, which attentions they object to, and what they accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from variant_cases import site_of

from attnfx import expr
from attnfx.decide import decide
from attnfx.errors import Objection, PolicyError
from attnfx.expr import Expr, Load
from attnfx.policy import Policy, Rule
from attnfx.site import AttentionSite, Origin, SideTensor
from attnfx.variants import (
    BiLevelRouting,
    Halo,
    LongRangeGroups,
    NeighborhoodAttention,
    Radial,
    SlidingWindow,
    WindowAttention,
)
from attnfx.variants.base import Example, Variant

I, J = expr.index("i"), expr.index("j")

PARAMETERS: list[tuple[Callable[[], Variant], str]] = [
    (lambda: SlidingWindow(0), "SlidingWindow.window is 0; it must be a whole number of at least 1."),
    (lambda: SlidingWindow(2.5), "SlidingWindow.window is 2.5; it must be a whole number"),  # type: ignore[arg-type]
    (lambda: SlidingWindow(True), "SlidingWindow.window is True; it must be a whole number"),
    (lambda: SlidingWindow(4, sinks=-1), "SlidingWindow.sinks is -1; it must be a whole number of at least 0."),
    (lambda: WindowAttention((8,), 4), r"WindowAttention.layout is \(8,\); it must be 2 or 3 whole numbers"),
    (lambda: WindowAttention((4, 4, 4, 4), 2), "it must be 2 or 3 whole numbers"),
    (lambda: WindowAttention((8, 0), 1), r"WindowAttention.layout is \(8, 0\)"),
    (lambda: WindowAttention([8, 8], 4), r"WindowAttention.layout is \[8, 8\]"),  # type: ignore[arg-type]
    (lambda: WindowAttention((8, 6), 7), "WindowAttention.window_size is 7; it must be from 1 to the axis, 6."),
    (lambda: WindowAttention((8, 6), 0), "WindowAttention.window_size is 0; it must be from 1 to the axis, 8."),
    (lambda: WindowAttention((8, 6), (2, 3, 2)), r"WindowAttention.window_size is \(2, 3, 2\); it must be one whole number, or 2"),
    (lambda: WindowAttention((8, 6), 2.0), "WindowAttention.window_size is 2.0"),  # type: ignore[arg-type]
    (lambda: WindowAttention((8, 6), 4, shift=4), "WindowAttention.shift is 4; it must be from 0 on and less than window_size, 4."),
    (lambda: WindowAttention((8, 6), 4, shift=(0, -1)), "WindowAttention.shift is -1"),
    (lambda: Halo((4, 4, 4, 4)), "Halo.layout is .* it must be 1 or 2 or 3 whole numbers"),
    (lambda: Halo((8, 8), block_size=0), "Halo.block_size is 0; it must be a whole number of at least 1."),
    (lambda: Halo((8, 8), halo_size=-1), "Halo.halo_size is -1; it must be a whole number of at least 0."),
    (lambda: LongRangeGroups((8, 8), 2), "LongRangeGroups.layout is .* it must be 3 whole numbers"),
    (lambda: LongRangeGroups((2, 8, 8), 0), "LongRangeGroups.group_num is 0; it must be a whole number"),
    (lambda: LongRangeGroups((9, 8, 6), 7), r"group_num is 7; the grid \(8, 6\) has fewer rows or columns."),
    (lambda: BiLevelRouting((2, 8, 8), 2, 1), "BiLevelRouting.layout is .* it must be 2 whole numbers"),
    (lambda: BiLevelRouting((8, 6), 4, 1), r"BiLevelRouting.n_win is 4; it must divide the layout, \(8, 6\)."),
    (lambda: BiLevelRouting((8, 6), 2, 5), "BiLevelRouting.topk is 5; there are 4 regions."),
    (lambda: BiLevelRouting((8, 6), 2, 0), "BiLevelRouting.topk is 0; it must be a whole number"),
    (lambda: Radial(0, 8), "Radial.frames is 0; it must be a whole number of at least 1."),
    (lambda: Radial(4, 0), "Radial.tokens_per_frame is 0"),
    (lambda: Radial(4, 8, text=-1), "Radial.text is -1; it must be a whole number of at least 0."),
    (lambda: Radial(4, 8, block_size=0), "Radial.block_size is 0"),
    (lambda: Radial(4, 8, decay_factor=-0.1), "Radial.decay_factor is -0.1; it must be a number from 0 on."),
    (lambda: Radial(4, 8, decay_factor=float("nan")), "Radial.decay_factor is nan"),
    (lambda: Radial(4, 8, decay_factor=float("inf")), "Radial.decay_factor is inf"),
    (lambda: Radial(4, 8, decay_factor=True), "Radial.decay_factor is True"),
    (lambda: Radial(4, 8, sink=1), "Radial.sink is 1; it must be true or false."),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "sentence"), PARAMETERS)
def test_parameters_are_refused_with_what_is_supported(make: Callable[[], Variant], sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        make()


#: Variants of 48 tokens.
OF_48: list[Variant] = [
    WindowAttention((6, 8), (3, 4)), Halo((6, 8), 2, 1), LongRangeGroups((2, 4, 6), 2), BiLevelRouting((6, 8), 2, 2),
    Radial(6, 7, text=6, block_size=4), NeighborhoodAttention((6, 7), 3, extra=6),
]  # fmt: skip
WINDOW = SlidingWindow(5, sinks=1)


def _site(queries: int | sympy.Expr = 48, keys: int | sympy.Expr = 48, keep: Expr = expr.TRUE, **fields: Any) -> AttentionSite:
    site = site_of(Example(OF_48[0], 48, 48, causal=False), torch.float32)
    return site.replace(queries=sympy.sympify(queries), keys=sympy.sympify(keys), keep=keep, **fields)


def _bias(*indices: Expr, shape: tuple[int, ...]) -> dict[str, Any]:
    """A site's fields with a tensor added to its scores."""
    side = (SideTensor(tuple(sympy.Integer(n) for n in shape), torch.float32),)
    return {"score": expr.add(expr.Score() * 0.25, Load(0, indices, torch.float32)), "side": side}


@pytest.mark.parametrize("variant", OF_48, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("lengths", [(48, 50), (1, 48), (47, 47), (sympy.Symbol("s0", integer=True, positive=True),) * 2])
def test_a_layout_has_as_many_queries_and_keys_as_tokens(variant: Variant, lengths: tuple[Any, Any]) -> None:
    (objection,) = variant.objections(_site(*lengths))
    assert objection.startswith(f"There are {lengths[0]} queries and {lengths[1]} keys; the layout ")
    assert "has 48 tokens, and needs as many of both." in objection
    assert ("6 further tokens" in objection) == isinstance(variant, Radial | NeighborhoodAttention)


@pytest.mark.parametrize("variant", [v for v in OF_48 if not isinstance(v, BiLevelRouting)], ids=lambda v: type(v).__name__)
def test_the_models_own_mask_and_bias_are_no_objection(variant: Variant) -> None:
    for keep in (expr.TRUE, expr.le(J, I), expr.le(J, expr.integer(40))):
        assert variant.objections(_site(keep=keep)) == ()
    assert variant.objections(_site(**_bias(I, J, shape=(48, 48)))) == ()


ROUTING: dict[str, tuple[dict[str, Any], str]] = {
    "causal": ({"keep": expr.le(J, I)}, "knows the places of the tokens"),
    "padding": ({"keep": expr.le(J, expr.integer(40))}, "knows the places of the tokens"),
    "bias": (_bias(I, J, shape=(48, 48)), "knows the places of the tokens"),
    "bias of heads": (_bias(expr.index("h"), shape=(4,)), "reads 1 further tensors; regions are attended apart, without one."),
}


@pytest.mark.parametrize("name", ROUTING)
def test_routing_attends_regions_apart_and_takes_no_mask_and_no_bias(name: str) -> None:
    fields, sentence = ROUTING[name]
    (objection,) = BiLevelRouting((6, 8), 2, 2).objections(_site(**fields))
    assert sentence in objection


WINDOWS: dict[str, tuple[dict[str, Any], str]] = {
    "cross attention": ({"queries": 20}, "The 20 queries and 48 keys have no common positions"),
    "two diagonals": (
        {"keep": expr.logical_and(expr.le(J, I), expr.le(J, I + expr.Int(sympy.Symbol("s1", integer=True)))), "queries": 20},
        "The mask has 2 causal diagonals, and a window needs one to follow.",
    ),
    "one query under data": (
        {"queries": 1, "keep": Load(0, (J,), torch.bool), "side": (SideTensor((sympy.Integer(48),), torch.bool),)},
        "The mask of the single query is data, so its position among the keys cannot be proved",
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_needs_positions(name: str) -> None:
    fields, sentence = WINDOWS[name]
    (objection,) = WINDOW.objections(_site(**fields))
    assert sentence in objection


@pytest.mark.parametrize(
    "fields", [{}, {"keep": expr.le(J, I)}, {"queries": 20, "keep": expr.le(J, I + 28)}, {"queries": 1}, _bias(J, shape=(48,))]
)
def test_a_window_takes_what_has_positions(fields: dict[str, Any]) -> None:
    assert WINDOW.objections(_site(**fields)) == ()


@pytest.mark.parametrize("variant", [*OF_48, WINDOW], ids=lambda v: type(v).__name__)
def test_an_order_that_cannot_be_kept_raises_and_a_wish_runs_exactly(variant: Variant) -> None:
    site = _site(queries=20).replace(origin=Origin(module="blocks.0.attn"))
    with pytest.raises(Objection, match=type(variant).__name__) as raised:
        decide(site, Policy([Rule("blocks.*", variant)]))
    assert "blocks.0.attn" in str(raised.value)
    wished = decide(site, Policy([Rule("*", variant)]))
    assert wished.exact
    assert wished.variant is None
    assert wished.reason.startswith(f"{type(variant).__name__} objects: ")
