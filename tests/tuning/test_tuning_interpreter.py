"""Whole searches of the real kernels, run by Triton's interpreter in a subprocess (`tuning_script.py` says what each one does)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interpreted import printed

HERE = Path(__file__).parent
pytestmark = pytest.mark.interpreter


@pytest.fixture
def searched(tmp_path: Path) -> Any:
    def run(name: str) -> Any:
        return json.loads(
            printed(HERE / "tuning_script.py", name, PYTHONPATH=str(HERE.parent / "lowering"), ATTNFX_CACHE_DIR=str(tmp_path))
        )

    return run


def test_each_kernel_runs_in_the_configuration_that_won(searched: Any) -> None:
    found = searched("winners")
    assert found["unasked"] == 0
    assert found["searched again"] == 0
    kernels = ("flash_forward", "flash_query_gradient", "flash_key_gradient", "flash_bias_gradient")
    for kernel in kernels:
        assert found["shipped"][kernel]["BLOCK_M"] > 16
        assert found["tuned"][kernel]["BLOCK_M"] == found["tuned"][kernel]["BLOCK_N"] == 16
    assert found["again"] == found["tuned"]
    assert {name.split()[1] for name in found["entries"]} == {"forward", "query_gradient", "key_gradient", "tile_bias"}
    for entry in found["entries"].values():
        assert (entry["ms"], entry["default_ms"]) == (1.0, 2.0)
        assert "softmax" in entry["about"]
    assert all(found["close"])


def test_splits_of_a_decode_step_are_tuned(searched: Any) -> None:
    found = searched("decode")
    assert found["tuned"]["decode_partial"]["splits"] > found["shipped"]["decode_partial"]["splits"]
    ((name, entry),) = found["entries"].items()
    assert name.split()[1] == "decode"
    assert entry["config"]["splits"] == found["tuned"]["decode_partial"]["splits"]


def test_a_kernel_that_is_wrong_in_one_configuration_is_not_chosen(searched: Any) -> None:
    found = searched("faulty")
    ((_, entry),) = found["entries"].items()
    assert entry["dropped"]["a wrong result"] > 0
    assert entry["config"]["block_n"] != 16
    assert 16 not in found["timed"]


def test_a_shipped_configuration_is_checked_against_the_plan(searched: Any) -> None:
    found = searched("distrusted")
    assert (found["entries"], found["timed"]) == ({}, [])
    assert len(found["warnings"]) == 1
    assert "does not tune forward" in found["warnings"][0]


def test_the_kernels_of_a_band_are_searched_with_their_second_product(searched: Any) -> None:
    assert searched("banded") == {"close": [True] * 5, "kernels": ["forward", "query_gradient", "key_gradient"]}


def test_nothing_is_searched_for_during_a_capture(searched: Any) -> None:
    found = searched("captured")
    assert found["during"] == 0 < found["after"]


def test_what_does_not_fit_here_gives_way_to_the_shipped_configuration(searched: Any) -> None:
    assert searched("unfit") == {"refused": [32], "close": True}


def test_a_model_is_tuned_forward_and_backward(searched: Any) -> None:
    found = searched("model")
    assert [k["kernel"] for k in found["first"]["kernels"]] == ["forward", "query_gradient", "key_gradient"]
    assert all(k["gain"] == 2.0 and k["best"]["block_n"] == 16 for k in found["first"]["kernels"])
    assert (found["remembered"], found["searched again"]) == (3, 0)
    assert found["told"] == ["forward", "key_gradient", "query_gradient"]
    assert all(found["gradients"])  # nothing of it is left in the model


def test_a_plain_attention_runs_as_what_was_measured_to_be_faster(searched: Any) -> None:
    found = searched("compared")
    assert (found["found"]["vendor_ms"], found["found"]["generated_ms"]) == (6.0, 2.0)
    assert (found["before"], found["after"], found["close"]) == ("vendor", "flash", "vendor")
    assert found["tuned"] == 2  # forward and backward
    assert found["hopeless"] == [6.1, 0]  # half as long again as the vendor's: no search makes up for that
    assert found["reason"] == "measured: 2 ms, torch's own kernel 6 ms"


def test_a_compile_asks_for_a_search_by_option_or_mode(searched: Any) -> None:
    assert searched("requested") == [0, 1, 1, 0]
