"""PerHead: heads that read their own numbers, what it refuses, and how policy files write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from variant_cases import SCALE, site_of, tensors_of

from attnfx import expr
from attnfx.composing import OnTensors
from attnfx.errors import PolicyError
from attnfx.policy import Policy
from attnfx.site import SideTensor
from attnfx.variants import PerHead, SlidingWindow, dense
from attnfx.variants.base import Example

H, I, J = (expr.index(name) for name in "hij")
WINDOW = SlidingWindow(5)
HALVES = PerHead((("0-1", WINDOW), ("2-3", None)))


def test_each_head_keeps_its_own_slope() -> None:
    example = Example(HALVES)
    slope = expr.cast(expr.Load(0, (H,), torch.float64), torch.float32)
    side = (SideTensor((sympy.Integer(4),), torch.float64),)
    site = site_of(example, torch.float64)
    site = site.replace(score=site.score + slope * expr.cast(J - I, torch.float32), side=side)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    q, k, v = tensors_of(example, torch.float64)
    got = HALVES.compose(OnTensors(site, [slopes], q.device, "portable"), q, k, v)
    i, j = torch.arange(37)[:, None], torch.arange(37)
    kept = torch.stack([(j <= i) & (i - j < 5)] * 2 + [j <= i] * 2)
    z = dense.scores(q, k, SCALE) + slopes[:, None, None] * (j - i)
    torch.testing.assert_close(got, dense.mixed(dense.softmax(z, kept), v), rtol=1e-6, atol=1e-6)


def test_heads_that_share_a_key_head_are_served_alike() -> None:
    (sentence,) = PerHead((("0-2", WINDOW),)).objections(site_of(Example(WINDOW, key_heads=2), torch.float64))
    assert sentence == "Heads 0 to 2 are served apart, and 2 heads share a key head each."


def test_a_head_that_is_not_there_is_refused() -> None:
    (sentence,) = PerHead((("4", WINDOW),)).objections(site_of(Example(WINDOW), torch.float64))
    assert sentence == "The choices name head 4; the site has 4 heads."


def test_objections_of_its_variants_are_its_own() -> None:
    crossed = Example(HALVES, queries=13, causal=False)
    assert HALVES.objections(site_of(crossed, torch.float64)) == WINDOW.objections(site_of(crossed, torch.float64)) != ()


def test_a_policy_file_has_a_table_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    choices = '{ "0-1" = { name = "SlidingWindow", window = 5 }, "2-3" = "keep" }'
    path.write_text(f'[[rules]]\nmodules = "*"\nvariant = {{ name = "PerHead", choices = {choices} }}\n', encoding="utf-8")
    assert Policy.load(path).rules[0].variant == HALVES


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({}, "must name a variant"),
        ({"a-b": WINDOW}, "must be numbers and ranges"),
        ({"3-1": WINDOW}, "it must rise"),
        ({"0-999999999": WINDOW}, "stay below"),
        ({"0-1": WINDOW, "1": WINDOW}, "names head 1 twice"),
        ({"0": HALVES}, "other than PerHead"),
        ({"0": "SlidingWindow"}, "each choice is a variant"),
        ((WINDOW,), "must name a variant"),
    ],
)
def test_parameters_are_checked(choices: Any, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        PerHead(choices)


@pytest.mark.parametrize(
    ("value", "complaint"), [({"window": 5}, "a table with a name"), (7, "a table with a name"), ("Sliding", "no variant")]
)
def test_what_a_file_says_is_checked(value: Any, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        PerHead.from_dict({"choices": {"0": value}})
