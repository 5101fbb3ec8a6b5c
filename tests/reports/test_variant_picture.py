"""Pictures of variants: exactly the keys that a query sees, and heads apart where they differ."""

from __future__ import annotations

from pathlib import Path

from attnfx import variants
from attnfx.reports.variant_picture import picture, weights
from attnfx.reports.variant_table import markdown
from attnfx.variants import IdentityMix, PerHead, SlidingWindow
from attnfx.variants.base import Example


def test_rows_and_columns_of_a_window() -> None:
    assert picture(Example(SlidingWindow(2, sinks=1), queries=5, keys=5)) == "█▄···\n█▀█▄·\n▀··▀▀"


def test_heads_that_differ_are_drawn_apart() -> None:
    drawn = picture(Example(PerHead((("2-3", SlidingWindow(1)),)), queries=4, keys=4))
    assert drawn == "head 0, 1\n█▄··\n███▄\n\nhead 2, 3\n▀▄··\n··▀▄"


def test_weights_are_those_of_the_formula() -> None:
    found = weights(Example(IdentityMix(0.5), queries=3, keys=3))
    assert found.shape == (4, 3, 3)
    assert bool((found.sum(-1) - 1).abs().max() < 1e-12)
    assert bool((found.diagonal(0, 1, 2) >= 0.5).all())


def test_the_gallery_of_the_docs_is_up_to_date() -> None:
    kept = Path(__file__).parents[2] / "docs" / "variants.md"
    assert kept.read_text(encoding="utf-8") == markdown(variants.all()), (
        "write it with: attnfx variants --markdown > docs/variants.md"
    )
