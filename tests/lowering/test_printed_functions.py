"""Functions that Triton lacks, as the printer writes them, in Triton's interpreter against torch."""

from pathlib import Path

import pytest
from functions_script import CLOSE, EXACT
from interpreted import line

pytestmark = [pytest.mark.interpreter]


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_a_printed_function_is_torchs(name: str) -> None:
    found = line(Path(__file__).parent / "functions_script.py", name)
    assert found["same"], found["why"]
