"""Hybrids in an unmodified model: layers that stay dense, a choice for each head, each phase and each length."""

from __future__ import annotations

import torch
from generating import generated

from attnfx.policy import Policy, Rule
from attnfx.variants import BlockTopK, PerHead, SlidingWindow, StreamingHeads

PROMPT, LONG = 20, 24
HEADS = PerHead({"0-1": SlidingWindow(4), "2-3": "keep"})
HYBRID = Policy([
    Rule(layers="0"),
    Rule("model.layers.1.*", BlockTopK(1, 4, sinks=0, query_block=4), phase="prefill"),
    Rule("model.layers.1.*", HEADS, phase="decode"),
    Rule("model.layers.*", StreamingHeads((0.0, 1.0), sinks=1, recent=3), when=f"kv_len >= {LONG}"),
])  # fmt: skip


def test_layers_heads_phases_and_lengths_choose_in_generate() -> None:
    """A condition that is crossed costs one compile, a length none: 6 steps, of which the last ones are long."""
    ids = torch.randint(1, 53, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    steps, reports = generated(HYBRID, ids, torch.ones_like(ids), tokens=7, layers=3)
    chosen = [[type(site.variant).__name__ for site in report.sites] for report in reports]
    assert [str(report.sites[0].site.queries) for report in reports] == ["20", "1", "1", "1"]
    assert chosen == [
        ["NoneType", "BlockTopK", "NoneType"],
        ["NoneType", "PerHead", "NoneType"],
        ["NoneType", "PerHead", "NoneType"],
        ["NoneType", "PerHead", "StreamingHeads"],
    ]
    dense, _ = generated(None, ids, torch.ones_like(ids), tokens=1, layers=3)
    assert not torch.allclose(steps[0], dense[0], atol=1e-3)
