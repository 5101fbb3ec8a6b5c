"""Every variant through the real kernels, run by Triton's interpreter in a subprocess (`oracle_script.py` says how)."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import rows

from attnfx import variants

pytestmark = pytest.mark.interpreter
NAMES = sorted(variants.all())
#: Variants that one process runs: each process takes seconds to begin.
TOGETHER = 16


@pytest.mark.parametrize("names", [NAMES[k : k + TOGETHER] for k in range(0, len(NAMES), TOGETHER)], ids=lambda names: names[0])
def test_kernels_give_what_the_oracles_give(names: list[str]) -> None:
    (found,) = rows(Path(__file__).parent / "oracle_script.py", "--few", *names)
    assert {name.partition("(")[0] for name in found} == set(names)
    far = {name: distances for name, distances in found.items() if not max(distances) < 1e-4}
    assert not far, far
