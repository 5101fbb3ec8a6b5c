"""The split-KV kernels on a GPU, with their default tiles and splits, over long caches and in every dtype, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from decode_cases import catalogue, few_queries, run
from flash_cases import Case
from flash_catalogue import CAUSAL, causal_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def longer() -> Iterator[Case]:
    """Every case in every dtype; and caches of thousands of keys, at the head dimensions of real models."""
    for case in (*catalogue(), *few_queries()):
        for dtype in DTYPES if case.dtype == torch.float32 else (case.dtype,):
            # half precision hides what a fill of -1e4 does
            if dtype == torch.float32 or "1e4" not in case.name:
                yield replace(case, name=f"{case.name} {str(dtype)[6:]}", dtype=dtype)
    for dtype in DTYPES:
        for m, n, heads, width in ((1, 8191, 8, 128), (16, 5003, 8, 64), (4, 4111, 2, 256), (1, 70_001, 4, 80)):
            yield causal_case(n - m, name="long", sizes=(2, heads, 2, m, n, width, width), dtype=dtype)


@pytest.mark.parametrize("case", list(longer()), ids=lambda case: case.name)
@pytest.mark.parametrize("splits", [None, 7])
def test_decode_on_gpu(case: Case, splits: int | None) -> None:
    on = replace(case, extras={**case.extras, "device": torch.device("cuda")})
    errors = run(on, torch.device("cuda"), splits, None, gradients=splits is None)
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


def test_forward_splits_and_is_deterministic() -> None:
    from attnfx.lowering.flash import forward

    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 9001, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    runs = [forward(CAUSAL, q, k, v, (), (9000,))[0] for _ in range(3)]
    assert all(torch.equal(runs[0], again) for again in runs[1:])
