"""SkipSoftmax: its examples leave out something, a decode step decides in runs, and what its parameters may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from variant_cases import EXAMPLES, SCALE, oracle, site_of, tensors_of

from attnfx.errors import PolicyError
from attnfx.variants import SkipSoftmax
from attnfx.variants.base import Example

MINE = {name: e for name, e in EXAMPLES.items() if isinstance(e.variant, SkipSoftmax)}


@pytest.mark.parametrize("example", MINE.values(), ids=MINE)
def test_its_examples_leave_out_something(example: Example) -> None:
    assert isinstance(example.variant, SkipSoftmax)
    q, k, v = tensors_of(example, torch.float64)
    assert 0.005 < example.variant.share(q, k, SCALE, example.causal) < 0.9
    whole = replace(example, variant=SkipSoftmax(1e-12))
    assert float((oracle(example, q, k, v) - oracle(whole, q, k, v)).abs().max()) > 1e-3


def test_a_threshold_of_nothing_leaves_out_nothing() -> None:
    example = Example(SkipSoftmax(1e-12), 40, 90)
    q, k, _ = tensors_of(example, torch.float64)
    assert SkipSoftmax(1e-12).share(q, k, SCALE) == 0.0


@pytest.mark.parametrize(("queries", "chunk"), [(1, 1024), (16, 1024), (17, None)])
def test_few_queries_are_a_step(queries: int, chunk: int | None) -> None:
    site = SkipSoftmax().apply(site_of(Example(SkipSoftmax(), queries, 90), torch.float32))
    assert site.skip is not None
    assert site.skip.chunk == chunk


def test_a_length_that_is_not_known_is_no_step() -> None:
    site = site_of(Example(SkipSoftmax(), 1, 90), torch.float32).replace(queries=sympy.Symbol("s0", integer=True, positive=True))
    assert SkipSoftmax().apply(site).skip == SkipSoftmax().apply(site.replace(queries=sympy.Integer(20))).skip


def test_training_is_refused() -> None:
    site = site_of(Example(SkipSoftmax()), torch.float32, requires_grad=True)
    assert "gradient" in SkipSoftmax().objections(site)[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threshold": 0.0}, "between 0 and 1"), ({"threshold": 1.0}, "between 0 and 1"), ({"threshold": "a"}, "finite number"),
        ({"scale_factor": 0.0}, "more than 0"), ({"scale_factor": float("inf")}, "finite number"), ({"rows": 48}, "one of 16, 32"),
        ({"keys": True}, "one of 16, 32"), ({"chunk": 100}, "multiple of keys, which is 64"), ({"chunk": 0}, "multiple of keys"),
    ],
)  # fmt: skip
def test_what_its_parameters_may_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        SkipSoftmax(**wrong)
