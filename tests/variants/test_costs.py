"""What variants say that they compute: never fewer pairs than their oracles weigh, and formulas of sizes that are not known."""

from __future__ import annotations

import pytest
import sympy
import torch
from variant_cases import BATCH, EXAMPLES, HEADS, SCALE, site_of, tensors_of

from attnfx.reports.density import work
from attnfx.variants import SlidingWindow
from attnfx.variants.base import Example, pairs

#: Sums over keys and summaries of them stand for many pairs each.
SUMMED = {
    "AgentAttention", "Based", "Combiner", "CoreContext", "Flowformer", "Lightning", "LinearAttention", "MALA", "TaylorWindow",
}  # fmt: skip
WEIGHED = {name: e for name, e in EXAMPLES.items() if type(e.variant).__name__ not in SUMMED}


@pytest.mark.parametrize("example", WEIGHED.values(), ids=WEIGHED)
def test_no_pair_is_kept_quiet(example: Example) -> None:
    """Means over blocks that are cut at the end are 6 % too small at most."""
    q, k, _ = tensors_of(example, torch.float64)
    one_hot = torch.eye(example.keys, dtype=torch.float64).expand(BATCH, example.key_heads, -1, -1)
    weights = example.variant.reference(q, k, one_hot, SCALE, causal=example.causal)
    said = float(example.variant.pairs(site_of(example, torch.float64)))
    assert said >= 0.94 * int((weights != 0).sum()) / (BATCH * HEADS)


def test_the_report_has_shares_or_formulas() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    example = Example(SlidingWindow(4), 32, 32)
    site = site_of(example, torch.float32)
    assert "(24.2%)" in work(example.variant, site)
    unknown = site.replace(queries=size, keys=size)
    assert sympy.expand(pairs(unknown) - size * (size + 1) / 2) == 0
    assert "Min(" in work(example.variant, unknown)
    assert "s0" in work(example.variant, unknown)
