"""Forward passes of real models: as close to float64 as eager is, with every kind of mask and at several lengths."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models import compare
from tests.models.zoo import LENGTH, MASKS, ZOO

DTYPES = (torch.float32, torch.bfloat16)
COMPILED_BY_INDUCTOR = ("llama-sdpa", "bloom", "t5")


def check(name: str, call: object, model: torch.nn.Module, kwargs: dict[str, object], what: str) -> None:
    """One forward of `call` against eager and float64."""
    with torch.no_grad():
        ours, eager = compare.outputs(call, kwargs), compare.outputs(model, kwargs)
    compare.assert_as_good(ours, eager, compare.reference(model, kwargs), f"{name}, {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_without_a_mask(name: str, dtype: torch.dtype) -> None:
    model, kwargs = ZOO[name].build(dtype=dtype)
    check(name, compare.compiled(model, inner="eager"), model, kwargs, f"{dtype}, no mask")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.supports_mask])
def test_with_masks_under_one_compile(name: str, dtype: torch.dtype) -> None:
    """Ones, then right, then left padding: the mask is data, so what was compiled for one serves the others."""
    case = ZOO[name]
    model, _ = case.build(dtype=dtype)
    call = compare.compiled(model, inner="eager")
    for mask in MASKS[1:]:
        check(name, call, model, case.arguments(mask=mask, dtype=dtype), f"{dtype}, mask of {mask}")
        if mask == MASKS[1]:
            compiles = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == compiles, "compiled anew for another mask of the same shape"


@pytest.mark.parametrize("name", COMPILED_BY_INDUCTOR)
def test_through_inductor(name: str) -> None:
    case = ZOO[name]
    model, _ = case.build()
    call = compare.compiled(model)
    for mask in ("left", "right"):
        check(name, call, model, case.arguments(mask=mask), f"Inductor, mask of {mask}")


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.lengths])
def test_two_lengths_under_one_dynamic_compile(name: str) -> None:
    case = ZOO[name]
    model, _ = case.build()
    call = compare.compiled(model, dynamic=True, inner="eager")
    for length in (48, 37):
        check(name, call, model, case.arguments(length), f"dynamic, length {length}")
    ours = counters["stats"]["unique_graphs"]
    counters.clear()
    torch._dynamo.reset()
    plain = torch.compile(model, dynamic=True, backend="eager")
    with torch.no_grad():
        for length in (48, 37):
            plain(**case.arguments(length))
    assert ours == counters["stats"]["unique_graphs"], "other number of compiles than without attnfx"


def test_ten_lengths_recompile_as_often_as_the_default_backend() -> None:
    """Automatic dynamic shapes: one static compile, one dynamic, and whatever guards Inductor itself adds."""
    case = ZOO["llama-sdpa"]
    model, _ = case.build()
    counted = {}
    for backend in ("inductor", "attnfx"):
        torch._dynamo.reset()
        counters.clear()
        call = compare.compiled(model) if backend == "attnfx" else torch.compile(model, backend=backend)
        with torch.no_grad():
            for length in range(LENGTH, LENGTH + 70, 7):
                call(**case.arguments(length))
        counted[backend] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert counted["attnfx"] == counted["inductor"]
