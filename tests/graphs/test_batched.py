"""vmap in a graph: what it computes is read through, and what cannot be read is never taken for something else."""

from __future__ import annotations

import pytest
import torch
from graphs import assert_same, compiled, dynamo_graph
from torch import Tensor

from attnfx.graphs import batched
from attnfx.graphs.capture import Tracer, capture

S = 19


def vmapped_mask(i: Tensor, j: Tensor, lengths: Tensor) -> Tensor:
    def keep(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j < lengths[0])

    return torch.vmap(torch.vmap(keep, (None, 0)), (0, None))(i, j)


def attend(q: Tensor, lengths: Tensor) -> Tensor:
    q = q.view(2, 3, -1, 8)
    i = torch.arange(q.shape[-2])
    mask = vmapped_mask(i, i, lengths)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)


def test_a_mask_made_under_vmap_is_a_formula() -> None:
    for dynamic in (False, True):
        q, lengths = torch.randn(2, 3, S, 8), torch.tensor([7])
        got, report = compiled(attend, q, lengths, dynamic=dynamic)
        (site,) = report.sites
        assert "| causal ∧ T0[j])" in str(site.site)
        assert_same(got, attend(q, lengths))


def test_levels_are_left_as_they_were() -> None:
    capture(dynamo_graph(attend, torch.randn(2, 3, S, 8), torch.tensor([7])))
    assert torch._C._functorch.peek_interpreter_stack() is None


def test_what_is_lost_under_vmap_is_lost_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = lambda self, result, node: "lost for this test" if batched.hidden(result) else None  # noqa: E731
    monkeypatch.setattr(Tracer, "difference", lost)
    q, lengths = torch.randn(2, 3, S, 8), torch.tensor([7])
    got, report = compiled(attend, q, lengths)
    assert not any("causal" in str(site.site) for site in report.sites)
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert_same(got, attend(q, lengths))
