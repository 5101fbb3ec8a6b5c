"""Calls made again from their tapes compute what the portable blocks compute on the tensors of that call."""

from pathlib import Path

import pytest
from interpreted import check
from replay_script import NAMES

pytestmark = [pytest.mark.interpreter]


@pytest.mark.parametrize("name", [*NAMES, "linear", "lists"])
def test_calls_made_again_agree_with_blocks(name: str) -> None:
    check(Path(__file__).parent / "replay_script.py", name, tolerance=3e-5)
