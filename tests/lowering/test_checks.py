"""What the flash kernels refuse: the value found and the values supported; tensors without memory stand for long ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnfx.lowering.checks import LONGEST, check


def tensors(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = {"queries": 5, "keys": 7, "heads": 4, "key_heads": 2, "width": 16, "value_width": 8, "dtype": torch.float32} | changes

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=s["dtype"], device="meta")

    keys = 1, s["key_heads"], s["keys"]
    return empty(1, s["heads"], s["queries"], s["width"]), empty(*keys, s["width"]), empty(*keys, s["value_width"])


@pytest.mark.parametrize("changes", [{}, {"queries": LONGEST - 1}, {"keys": LONGEST - 1}, {"width": 256, "value_width": 256}])
def test_what_is_taken(changes: dict[str, Any]) -> None:
    check(*tensors(**changes), 0.0, None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"queries": LONGEST}, f"there are {LONGEST} queries; supported: fewer than {LONGEST}"),
        ({"keys": LONGEST}, f"there are {LONGEST} keys; supported: fewer than {LONGEST}"),
        ({"heads": 3}, "3 query heads over 2 key heads"),
        ({"width": 257}, "head_dim is 257"),
        ({"value_width": 0}, "value dim is 0"),
        ({"dtype": torch.float64}, "supported: one of float16, bfloat16, float32"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(*tensors(**changes), 0.0, None)


def test_dropout_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="dropout needs a seed"):
        check(*tensors(), 0.1, None)
    with pytest.raises(ValueError, match=r"dropout_p is 1\.5"):
        check(*tensors(), 1.5, torch.zeros(1, dtype=torch.int64))
