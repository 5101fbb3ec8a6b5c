"""The flash kernels on a GPU, with their default blocks, at larger sizes and in every dtype, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from flash_cases import Case, run
from flash_catalogue import cases
from flash_script import dropout_statistics, empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def larger() -> Iterator[Case]:
    """The catalogue, but rows and keys seven times as many and odd: default blocks meet full tiles and edges."""
    for case in cases():
        b, h, hk, m, n, d, dv = case.sizes
        longer = (b, h, hk, 7 * m, 7 * n, d, dv) if not case.dropout else case.sizes
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            # the catalogue's own dtypes are there for the interpreter; float32 shows what half precision would hide
            if case.dtype == torch.float32 and (dtype == torch.float32 or "1e4" not in case.name):
                name = f"{case.name} {str(dtype)[6:]}"
                yield replace(case, name=name, sizes=longer, dtype=dtype, block=64 if case.dropout else case.block)
    for d, dv in ((128, 128), (256, 256), (96, 64), (192, 128)):
        base = next(case for case in cases() if case.name.startswith("causal ahead 0"))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield replace(base, name=f"causal D{d} DV{dv} {str(dtype)[6:]}", sizes=(1, 4, 2, 391, 517, d, dv), dtype=dtype)


@pytest.mark.parametrize("case", list(larger()), ids=lambda case: case.name)
def test_flash_on_gpu(case: Case) -> None:
    errors = run(case, torch.device("cuda"))
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


def test_empty_sizes_on_gpu() -> None:
    assert empties(torch.device("cuda")) == {"empty": 0.0}


def test_dropout_statistics_on_gpu() -> None:
    errors = dropout_statistics(torch.device("cuda"))
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


def test_gradients_are_deterministic() -> None:
    from flash_catalogue import CAUSAL

    from attnfx.lowering.flash import backward, forward

    q, k, v = (torch.randn(2, 8 if i == 0 else 2, 777, 64, device="cuda", dtype=torch.bfloat16) for i in range(3))
    out, residuals = forward(CAUSAL, q, k, v, (), (0,))
    runs = [backward(CAUSAL, q, k, v, out, residuals, torch.ones_like(out), (), (0,)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
