"""A query of NaN: gradients of learned biases are NaN where eager's are, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreted import check
from nan_row_script import CASES, Case, error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_of_torch_operations(case: Case) -> None:
    assert error(*case, family="portable") < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels(case: Case) -> None:
    check(Path(__file__).parent / "nan_row_script.py", str(case), tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_on_a_gpu(case: Case) -> None:
    assert error(*case, device="cuda") < 1e-4
