"""The ground truth of benchmarks/coverage counts what a reader of the code counts, and its page says what the rows hold."""

import torch
from torch import nn

from benchmarks.coverage.measure import Row
from benchmarks.coverage.registry import load
from benchmarks.coverage.table import page
from benchmarks.coverage.truth import Truth, count


class Mixed(nn.Module):
    """One attention written out, one call of the fused operator, and two look-alikes: a router and a gate of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.router = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.inner(x) @ x.transpose(-1, -2)).softmax(-1) @ x
        x = nn.functional.scaled_dot_product_attention(x, self.inner(x), x)
        return x + self.router(x).softmax(-1) @ self.experts


def test_truth() -> None:
    assert count((Mixed(), (torch.randn(2, 5, 8),), {})) == Truth(fused=1, written_out=1)
    attention = load()["torch_attention_weights"].build()
    assert count(attention) == Truth(fused=0, written_out=1)


def test_page() -> None:
    row = Row("a", "torch", "causal", sites=4, rewritten=3, fused=1, graphs=1, plain_graphs=1, missed=[(1, "its reason")])
    absent = Row("b", "gone", "causal", skipped="gone cannot be imported")
    text = page({"torch": "2.13", "rows": {"a": row.to_dict(), "b": absent.to_dict()}})
    assert "**3** (75 %)" in text
    assert "| a | 1 | its reason |" in text
    assert "gone cannot be imported" in text
