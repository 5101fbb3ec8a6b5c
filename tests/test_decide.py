"""Decisions: the fastest exact lowering by default, a variant by rule, and reasons that say what was found."""

from __future__ import annotations

import pytest
import sympy
import torch
from test_site import CAUSAL, SCALED, site

from attnfx import expr
from attnfx.decide import decide, family
from attnfx.errors import Objection
from attnfx.expr import Load, index
from attnfx.lowering.plan import KernelPlan
from attnfx.policy import Policy, Rule
from attnfx.site import Origin, SideTensor
from attnfx.variants import SlidingWindow

SQUARE = {"queries": sympy.Integer(7)}
PADDING = SideTensor((sympy.Integer(2), sympy.Integer(7)), torch.bool)
PADDED = Load(0, (index("b"), index("j")), torch.bool)


def test_plain_attention_goes_to_the_vendor() -> None:
    assert decide(site(**SQUARE), Policy()).name == "vendor"
    chosen = decide(site(keep=CAUSAL, **SQUARE), Policy())
    assert chosen.kernel == "vendor"
    assert "causal" in chosen.reason


def test_causal_with_more_keys_than_queries_is_ours() -> None:
    """torch's causal flag starts at the top left; so does j <= i, but not for every torch kernel: lengths have to be equal."""
    chosen = decide(site(keep=CAUSAL), Policy())
    assert isinstance(chosen.kernel, KernelPlan)
    assert "proved" in chosen.reason


def test_a_mask_that_is_data_is_evaluated() -> None:
    chosen = decide(site(keep=PADDED, side=(PADDING,)), Policy())
    assert isinstance(chosen.kernel, KernelPlan)
    assert "evaluated in the tile" in chosen.reason


def test_devices_and_dtypes() -> None:
    assert family(site()) == "portable"
    assert family(site(device="cuda")) == "flash"
    assert family(site(device="cuda", dtype=torch.float64)) == "portable"
    assert family(site(device="xla")) == "portable"


def test_rules() -> None:
    at = site(keep=CAUSAL, origin=Origin("layers.3.attn"), **SQUARE)
    window = SlidingWindow(window=2)
    chosen = decide(at, Policy([Rule("layers.[2-4].attn", window), Rule("*", None)]))
    assert (chosen.variant, chosen.exact) == (window, False)
    assert chosen.site.facts.delta_high == (1,)
    assert decide(at, Policy([Rule("layers.3.*", None), Rule("*", window)])).exact


def test_an_objection_is_an_error_for_an_order_and_a_reason_for_a_wish() -> None:
    cross = site(origin=Origin("cross"))
    with pytest.raises(Objection, match="SlidingWindow cannot serve cross"):
        decide(cross, Policy([Rule("cross", SlidingWindow(window=2))]))
    left = decide(cross, Policy([Rule("*", SlidingWindow(window=2))]))
    assert left.exact
    assert left.reason.startswith("SlidingWindow objects:")


def test_what_has_no_plan_is_kept_with_the_reason() -> None:
    table = SideTensor((sympy.Integer(4),), torch.float32, requires_grad=True)
    learned = expr.call("mul", SCALED, Load(0, (index("h"),), torch.float32), dtype=torch.float32)
    kept = decide(site(score=learned, side=(table,), requires_grad=True), Policy())
    assert (kept.name, kept.kernel) == ("kept", None)
    assert "gradient" in kept.reason
