"""What holds for every variant: it is registered, frozen data, documented, and survives a policy file."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from attnfx import variants
from attnfx.policy import Policy, Rule
from attnfx.variants.base import Variant

EXAMPLES: dict[str, list[Variant]] = {
    "LowRankBias": [variants.LowRankBias(), variants.LowRankBias(rank=5), variants.LowRankBias(tolerance=0.01)],
    "NeuralBias": [variants.NeuralBias("networks.pt")],
    "SlidingWindow": [variants.SlidingWindow(8), variants.SlidingWindow(8, sinks=2)],
}
"""Instances of each variant; a new variant adds its own here."""


def test_every_variant_has_examples() -> None:
    assert sorted(EXAMPLES) == list(variants.all())


@pytest.mark.parametrize("variant", [example for examples in EXAMPLES.values() for example in examples], ids=repr)
def test_variant_is_data(variant: Variant, tmp_path: Path) -> None:
    assert type(variant).from_dict(variant.to_dict()) == variant
    assert hash(variant) == hash(type(variant).from_dict(variant.to_dict()))
    policy = Policy([Rule("*", variant)])
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy


@pytest.mark.parametrize("name", variants.all())
def test_variant_is_documented(name: str) -> None:
    variant = variants.all()[name]
    assert variant.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert getattr(variants, name) is variant
    assert variant.paper
    assert variant.exactness
    assert inspect.getdoc(variant)
    assert dataclasses.fields(variant)  # type: ignore[arg-type]


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="SlidingWindows"):
        _ = variants.SlidingWindows
