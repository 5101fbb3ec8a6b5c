"""What holds for every variant: it is registered, frozen data, documented, and survives a policy file."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from attnfx import variants
from attnfx.policy import Policy, Rule
from attnfx.variants.base import Variant

EXAMPLES = list(dict.fromkeys(example.variant for variant in variants.all().values() for example in variant.examples()))


def test_every_variant_has_examples() -> None:
    assert {type(example) for example in EXAMPLES} == set(variants.all().values())


@pytest.mark.parametrize("variant", EXAMPLES, ids=repr)
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
