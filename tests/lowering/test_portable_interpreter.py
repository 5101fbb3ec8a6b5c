"""The generated Triton functions in Triton's interpreter compute what the portable blocks compute, dropout masks included."""

from pathlib import Path

import pytest
from interpreted import check
from interpreter_script import chosen

pytestmark = [pytest.mark.interpreter]


@pytest.mark.parametrize("name", [e.name for e in chosen()])
def test_kernels_and_blocks_agree(name: str) -> None:
    check(Path(__file__).parent / "interpreter_script.py", name, tolerance=3e-5)
