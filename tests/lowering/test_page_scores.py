"""Scores of pages: the kernel, the operator, and the decode step that chooses by them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from interpreted import check
from page_scores_script import CASES, error, operands
from torch._subclasses import FakeTensorMode

from attnfx.lowering.page_scores import page_scores
from attnfx.variants import BlockTopK, gathered
from attnfx.variants.base import Example

sys.path.insert(0, str(Path(__file__).parents[1] / "variants"))
from variant_cases import applied, oracle, tensors_of


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_torchs_operations(case: tuple[int, int, int]) -> None:
    check(Path(__file__).parent / "page_scores_script.py", str(case), tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu_is_torchs_operations(case: tuple[int, int, int]) -> None:
    assert error(*case, "cuda") < 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_means_of_products(case: tuple[int, int, int]) -> None:
    keys, page, width = case
    key, by = operands(keys, width)
    pages = [(key[:, :, j : j + page].double() * by.double()).sum(-1).mean(-1) for j in range(0, keys, page)]
    torch.testing.assert_close(page_scores(key, by, page).double(), torch.stack(pages, -1), atol=1e-5, rtol=1e-5)


def test_the_operator_has_a_shape_and_may_be_mapped() -> None:
    key, by = operands(33, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.ops.attnfx.page_scores(key, by, 8).shape == (2, 3, 5)
    both = torch.vmap(lambda b: torch.ops.attnfx.page_scores(key, b, 8))(torch.stack([by, -by]))
    torch.testing.assert_close(both[1], -both[0])


def test_a_decode_step_chooses_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(gathered, "has_kernel", lambda device, dtype, page: asked.append(page) is None)
    example = Example(BlockTopK(top=2, page=4, sinks=1), queries=1, keys=40)
    q, k, v = tensors_of(example, torch.bfloat16)
    got = applied(example, q, k, v)
    assert asked == [4]
    torch.testing.assert_close(got.double(), oracle(example, *(t.double() for t in (q, k, v))), atol=2e-2, rtol=2e-2)


def test_where_a_kernel_scores() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert gathered.has_kernel(cuda, torch.bfloat16, 128)
    assert not gathered.has_kernel(cuda, torch.bfloat16, 129)
    assert not gathered.has_kernel(cuda, torch.float32, 16)
    assert not gathered.has_kernel(cpu, torch.bfloat16, 16)
