"""Sites and expressions as JSON: they come back equal, and nothing else is read."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.sites.serialize import FormatError, Reader, Writer, read_integer, site_from_data, site_to_data, write_integer

sys.path.insert(0, str(Path(__file__).parents[1] / "lowering"))
from band_sites import banded
from band_sites import examples as band_examples
from interpreter_script import half_fills
from lowering_sites import SCALED, causal, examples, load, side, site, t5
from sink_cases import examples as sink_examples
from skip_cases import examples as skip_examples
from unnormalised_cases import examples as unnormalised_examples

S0, S1 = sympy.symbols("s0 s1", integer=True, positive=True)


@pytest.mark.parametrize(
    "example",
    [*examples(), *sink_examples(), *unnormalised_examples(), *band_examples(), *skip_examples(), half_fills(37)],
    ids=lambda e: e.name,
)
def test_a_site_comes_back_equal(example: Any) -> None:
    writer = Writer()
    data = json.loads(json.dumps(site_to_data(example.site, writer)))
    reader = Reader(json.loads(json.dumps(writer.nodes)), len(example.site.side))
    assert site_from_data(data, reader) == example.site


@pytest.mark.parametrize(
    "e",
    [
        S0, S0 * S1 + 3, S0**2 - S1, FloorDiv(S0, S1), Mod(S0, 4), PythonMod(S0 - S1, 4), sympy.Integer(-7),
        Max(0, S1 - Min(S0, 7)),
    ],
    ids=str,
)  # fmt: skip
def test_an_integer_comes_back_equal(e: sympy.Expr) -> None:
    assert read_integer(json.loads(json.dumps(write_integer(e)))) == e


def test_equal_plans_give_equal_text_and_one_object() -> None:
    first, second = (make_plan(site(keep=causal()), "flash") for _ in range(2))
    assert isinstance(first, KernelPlan)
    assert isinstance(second, KernelPlan)
    assert first.to_json() == second.to_json()
    assert KernelPlan.from_json(first.to_json()) == first
    assert KernelPlan.from_json(first.to_json()) is KernelPlan.from_json(second.to_json())


def _text() -> dict[str, Any]:
    plan = make_plan(site(t5(), causal(), side=(side(32, 4, grad=True),)), "portable")
    assert isinstance(plan, KernelPlan)
    found: dict[str, Any] = json.loads(plan.to_json())
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("attnfx",), 99, "format is 99"),
        (("family",), "cuda", "known: flash, portable"),
        (("more",), 1, r"unknown keys \['more'\]"),
        (("site", "dtype"), "complex64", "complex64"),
        (("site", "fill"), "nan", "a finite float"),
        (("site", "empty_rows"), "maybe", "maybe"),
        (("site", "keys"), ["Symbol", "__import__('os')"], "a symbol is"),
        (("site", "keys"), ["Symbol", "s0", "commutative"], "a symbol is"),
        (("site", "keys"), ["Pow", ["Symbol", "s0"], 1000], "the power is"),
        (("site", "keys"), ["Pow", 10, 10], "the power is"),
        (("site", "keys"), ["FloorDiv", ["Symbol", "s0"], 0], "a division"),
        (("site", "keys"), ["Function", 1, 2], "known: integers, Symbol"),
        (("site", "keys"), 2**80, "64 bits"),
        (("site", "keys"), "53", "an integer expression is"),
        (("site", "score"), 10_000, "not one of the"),
        (("site", "sink"), 10_000, "not one of the"),
        (("site", "weight"), None, "not one of the"),
        (("tables", 0, "slot"), 7, "slot 7"),
        (("gradients", 0, "kind"), "dense", "known: tile"),
        (("nodes", 0), ["call", "system", [], "float32"], "the operation is 'system'"),
        (("nodes", 0), ["load", 9, [], "float32"], "slot 9"),
        (("nodes", 0), ["call", "neg", [5], "float32"], "nodes before it"),
        (("nodes", 0), ["lambda"], "known: int, const"),
    ],
)
def test_what_is_not_known_is_refused_by_name(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        KernelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(("place", "value"), [(0, 1.0), (0, 1), (1, 0.0), (2, 0), (3, True), (4, 24), (4, -16)])
def test_tiles_that_are_none_are_refused(place: int, value: Any) -> None:
    plan = make_plan(next(e.site for e in skip_examples() if e.name == "step"), "portable")
    assert isinstance(plan, KernelPlan)
    data = json.loads(plan.to_json())
    data["site"]["skip"][place] = value
    with pytest.raises(FormatError, match="skip is"):
        KernelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(1, 7, "slot 7"), (0, 7, "slot 7"), (3, 0, "a band is"), (5, "inf", "a band is"), (2, 0, "no function of i - j")],
)
def test_a_band_that_is_none_is_refused(place: int, value: Any, message: str) -> None:
    plan = make_plan(banded(), "portable")
    assert isinstance(plan, KernelPlan)
    data = json.loads(plan.to_json())
    data["nodes"].append(["int", ["Symbol", "j", "integer", "nonnegative"]])
    data["site"]["band"][place] = len(data["nodes"]) - 1 if place == 2 else value
    with pytest.raises(FormatError, match=message):
        KernelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000, '{"attnfx": NaN}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        KernelPlan.from_json(text)


def test_deep_nesting_is_refused() -> None:
    value: Any = 1
    for _ in range(200):
        value = ["Add", value, ["Symbol", "s0"]]
    with pytest.raises(FormatError, match="deeper"):
        read_integer(value)


def test_a_slot_that_is_no_number_is_refused() -> None:
    e = SCALED + expr.Load("node", (), torch.float32)
    with pytest.raises(FormatError, match="numbered slots"):
        Writer().add(e)
    assert load(0).slot == 0
