"""A small part of the cross-compilation check; `attnfx.lowering.crosscompile.check()` is the whole of it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attnfx.lowering.configs import KERNELS, SHARED_LIMIT, default
from attnfx.lowering.crosscompile import BANDED, BOXES, LISTED, LISTS, SHORT, TARGETS, Job, check
from attnfx.lowering.linear import samples as linear


@pytest.mark.parametrize("target", TARGETS)
def test_forward_compiles_without_spills(target: str) -> None:
    rows = check([target], [Job("causal", torch.bfloat16, 64, target, ("forward",))], processes=1)
    assert [row.template for row in rows] == ["forward"]
    assert [row for row in rows if row.spills or not row.ok] == []
    assert rows[0].registers > 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_training_compiles_for_hopper_without_spills(head_dim: int) -> None:
    rows = check(["sm90"], [Job("causal", torch.bfloat16, head_dim, "sm90")], processes=1)
    assert {row.template for row in rows} == {"forward", "query_gradient", "key_gradient"}
    assert [row for row in rows if not row.ok] == []


def test_a_weight_beside_exact_rows_spills_nothing_on_hopper() -> None:
    rows = check(["sm90"], [Job("bias, finfo.min added, weight", torch.bfloat16, 128, "sm90")], processes=1)
    assert len(rows) == 3
    assert [row for row in rows if row.spills or not row.ok] == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_second_product_compiles(target: str) -> None:
    kernels = ("forward", "query_gradient", "key_gradient", "window_gradient")
    rows = check([target], [Job(BANDED, torch.bfloat16, 64, target, kernels)], processes=1)
    assert {row.template for row in rows} == set(kernels)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("target", TARGETS)
def test_lists_compile_without_spills(target: str) -> None:
    rows = check([target], [Job(LISTED, torch.bfloat16, 64, target, (*LISTS, "forward"))], processes=1)
    assert {row.template for row in rows} == {*LISTS, "forward"}
    assert [row for row in rows if not row.ok or (row.spills and row.template in LISTS)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_that_are_boxes_compile(target: str) -> None:
    (row,) = check([target], [Job(BOXES, torch.bfloat16, 64, target, ("forward",))], processes=1)
    assert row.ok, row


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_for_few_rows_compile(target: str) -> None:
    rows = check([target], [Job("bias, finfo.min added", torch.bfloat16, 32, target, SHORT)], processes=1)
    assert {row.template for row in rows} == set(SHORT)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("target", TARGETS)
def test_linear_attention_compiles(target: str) -> None:
    rows = check([target], [Job("linear, normalised", torch.bfloat16, 64, target, linear.KERNELS)], processes=1)
    assert {row.template for row in rows} == set(linear.KERNELS)
    assert [row for row in rows if not row.ok] == []


def test_each_target_is_told_before_its_first_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("attnfx.lowering.crosscompile.compile_job", lambda job: (told.append(job.head_dim), [])[1])
    jobs = [Job("causal", torch.bfloat16, head_dim, target) for target in ("sm80", "sm90") for head_dim in (64, 128)]
    assert check(["sm80", "sm90"], jobs, processes=1, begun=told.append) == []
    assert told == ["sm80", 64, 128, "sm90", 64, 128]


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="sm70"):
        check(["sm70"])


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_size_has_a_default(target: str) -> None:
    for kernel in KERNELS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for head_dim, value_dim in ((1, 256), (40, 64), (80, 128), (256, 1)):
                config = default(kernel, dtype, head_dim, value_dim, target)
                assert config.block_m >= 16
                assert config.block_n >= 16
                if kernel == "diagonal_bias":
                    assert config.block_m == config.block_n
