"""What `benchmarks.derivations` shows holds: ranks, forms, and no S x S tensor where a formula says the same."""

from typing import Any

import pytest

from benchmarks.derivation_rows import ROWS
from benchmarks.derivations import run, table, wrong

NAMED = {row.name: row for row in ROWS}


def derived(name: str) -> dict[str, Any]:
    result = run(NAMED[name])
    assert wrong(result) == ""
    return result


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("bloom alibi", "loaded"),
        ("mpt alibi", "loaded"),
        ("causal alibi", "one number for each key"),
        ("sinusoid", "rank 2"),
        ("t5 buckets", "table[h, i - j]"),
        ("swin table", "table[h, i, j]"),
        ("distance 2-d", "rank 3"),
        ("distance 3-d", "rank 4"),
        ("distance 3-d summed", "rank 4"),
        ("convit gpsa", "rank 3"),
        ("sam decomposed", "computed in the tile"),
        ("packed documents", ""),
    ],
)
def test_rows(name: str, form: str) -> None:
    result = derived(name)
    assert any(form in text for text in result["forms"]) or not form
    # a window's table is far smaller than the queries, which there are 64 windows of
    assert result["dense"] == (4 * 49 * 49 if name == "swin table" else 0)
    assert name in table([result])


def test_what_is_wrong_is_said() -> None:
    good = {"row": "x", "error": 1e-7, "rank": 3, "known_rank": 3}
    assert wrong(good) == ""
    assert "error" in wrong(good | {"error": float("nan")})
    assert "rank 4, known 3" in wrong(good | {"rank": 4})
    assert wrong({"row": "x", "failure": "no attention found"}) == "no attention found"
