"""Gradients of learned biases on a GPU: the same bits in every run, and nothing that torch has no deterministic algorithm for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from determinism_cases import CASES, different

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["flash", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it where products are deterministic
    site = CASES[name].replace(device="cuda")
    assert different(site, family, torch.device("cuda"), times=4) == []  # type: ignore[arg-type]
