"""What the tests leave out of Triton's interpreter changes no bit of what kernels compute."""

from pathlib import Path

import pytest
from interpreted import printed


@pytest.mark.interpreter
def test_the_quick_interpreter_is_tritons_own() -> None:
    """Relative errors of the outputs and gradients of one case, digit by digit."""
    script, case = Path(__file__).parent / "lowering" / "flash_script.py", "window 5"
    quick, own = (printed(script, case, quick=way) for way in (True, False))
    assert "errors" in own
    assert quick == own
