"""The split-KV kernels, run by Triton's interpreter in a subprocess, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import beyond, rows

SCRIPT = Path(__file__).parent / "decode_script.py"
# chosen by the start of their names; together they hold every case
GROUPS = (
    ("few plain", "few ahead", "few MHA", "few MQA", "few window", "few padding", "few of a long cache"),
    ("few sdpa", "few replaced", "few -", "few dropout", "plain", "layout", "window", "padded", "alibi", "diagonal", "tile"),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_decode_in_interpreter(group: tuple[str, ...]) -> None:
    found = rows(SCRIPT, *group)
    assert [part for part in group if not any(row["case"].startswith(part) for row in found)] == []
    over = {row["case"]: beyond(row["errors"], 1) for row in found}
    assert {case: errors for case, errors in over.items() if errors} == {}
