"""LowRankBias by the Triton kernels in Triton's interpreter: what the portable operations compute, and the definition."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import rows

BOUND = {"torch.float32": 2e-5, "torch.float16": 2e-3}


@pytest.mark.interpreter
def test_kernels_and_blocks_agree() -> None:
    found = rows(Path(__file__).parent / "low_rank_script.py")
    assert len(found) == 8
    assert [row for row in found if row["by"] != ["flash", "portable"]] == []
    assert [row for row in found if not max(*row["errors"], row["exact"]) <= BOUND[row["dtype"]]] == []
