"""Training steps of real models: every parameter's gradient is as close to float64 as eager's is."""

import pytest
import torch

from tests.models import compare
from tests.models.zoo import ZOO

DRAWS = 5
TRAINED = [name for name, case in ZOO.items() if case.trains]


def check(name: str, mask: str, dtype: torch.dtype, **options: object) -> None:
    """One training step (dropout 0) under attnfx against eager and float64."""
    case = ZOO[name]
    model, _ = case.build(dtype=dtype)
    model.train()
    draws = [case.arguments(mask=mask, dtype=dtype, seed=seed) for seed in range(DRAWS)]
    eager = compare.gradients_of(model, model, draws)
    ours = compare.gradients_of(model, compare.compiled(model, **options), draws)
    exact = compare.reference_gradients(model, draws)
    compare.assert_as_good(ours, eager, exact, f"{name}, {dtype}, mask of {mask}", eps=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    check(name, "none", dtype, inner="aot_eager" if dtype is torch.float32 else "eager")


@pytest.mark.parametrize("mask", ["right", "left"])
@pytest.mark.parametrize("name", ["llama-sdpa", "llama-eager", "bloom", "bert", "t5"])
def test_gradients_with_padding(name: str, mask: str) -> None:
    check(name, mask, torch.float32, inner="eager")


@pytest.mark.parametrize("name", ["llama-eager", "bloom"])
def test_gradients_through_inductor(name: str) -> None:
    check(name, "none", torch.float32)
