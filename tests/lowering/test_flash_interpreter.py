"""The flash kernels, run by Triton's interpreter in a subprocess, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import beyond, rows

SCRIPT = Path(__file__).parent / "flash_script.py"
# chosen by the start of their names; together they hold every case
GROUPS = (
    ("plain", "layout", "softcap"),
    ("causal", "window", "padding", "padded", "alibi"),
    ("tile", "column", "diagonal"),
    ("dropout", "weight", "empty"),
    ("short",),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_flash_in_interpreter(group: tuple[str, ...]) -> None:
    found = rows(SCRIPT, *group)
    assert [part for part in group if not any(row["case"].startswith(part) for row in found)] == []
    over = {row["case"]: beyond(row["errors"], 1) for row in found}
    assert {case: errors for case, errors in over.items() if errors} == {}
