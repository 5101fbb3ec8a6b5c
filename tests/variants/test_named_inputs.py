"""Documents that the model's caller tells, by ids or by positions: other ones in every call and row, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import compiled
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from attnfx.backend import attnfx, listeners
from attnfx.errors import PolicyError
from attnfx.policy import Policy, Rule
from attnfx.report import Report
from attnfx.variants import Anchor, Documents, PerHead, dense
from attnfx.variants.base import Variant


def policy(variant: Variant) -> Policy:
    """An order, whose objections are errors."""
    return Policy([Rule("re:.{0,99}", variant)])


def numbered(*rows: tuple[int, ...]) -> Tensor:
    """The number of its document for each token, of lengths in each row."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def test_a_packed_llama_is_each_document_alone() -> None:
    """Positions begin again in each document; a mask of ones keeps transformers from seeing that itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model, rows = LlamaModel(config).eval(), ((9, 1, 13), (4, 19, 0))
    ids = torch.randint(0, 53, (2, 23))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])

    def call(ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = model(ids, position_ids=position_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return found

    with torch.no_grad():
        rule = policy(Documents(positions="position_ids"))
        got, report = compiled(call, ids, positions, torch.ones_like(ids), policy=rule)
        alone = [
            torch.cat([model(part[None], use_cache=False).last_hidden_state[0] for part in ids[b].split(row) if len(part)])
            for b, row in enumerate(rows)
        ]
    assert [type(site.variant) for site in report.sites] == [Documents] * 2
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    def forward(self, x: Tensor, **batch: Any) -> Tensor:
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        out = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return out * (sum(t.sum() for t in batch.values()) * 0 + 1)  # what a graph does not read is none of its inputs


def attended(x: Tensor, kept: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return dense.attention(heads, heads, heads, 8**-0.5, kept & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("variant", "shared", "heads"),
    [
        (Documents(ids="document_ids"), 0, 4),
        (Anchor(ids="document_ids", anchors=2), 2, 4),
        (PerHead({"0-1": Documents(ids="document_ids")}), 0, 2),
    ],
    ids=["documents", "anchor", "two heads"],
)
def test_documents_of_every_call_are_its_own(variant: Variant, shared: int, heads: int) -> None:
    """One compile serves all of them, with gradients; ids may be any numbers, and those of all rows may be told once."""
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    try:
        model = torch.compile(Layer(), backend=attnfx, options={"inner": "eager", "strict": True, "policy": policy(variant)})
        for ids in (numbered((9, 2, 12), (20, 3)) * 7 - 5, numbered((1, 22), (11, 12)).flip(0)):
            x = torch.randn(2, 23, 32, requires_grad=True)
            kept = (ids[:, None, :, None] == ids[:, None, None, :]) | (torch.arange(23) < shared)
            kept = torch.cat([kept.expand(2, heads, 23, 23), torch.ones(2, 4 - heads, 23, 23, dtype=torch.bool)], 1)
            got, want = model(x, document_ids=ids), attended(x, kept)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    finally:
        listeners.reset(token)
    assert len(reports) == 1


def test_ids_of_one_row_are_those_of_all() -> None:
    ids, x = numbered((9, 2, 12))[0], torch.randn(2, 23, 32)
    got, _ = compiled(lambda x, seq_idx: Layer()(x, seq_idx=seq_idx), x, ids, policy=policy(Documents(ids="seq_idx")))
    torch.testing.assert_close(got, attended(x, ids[:, None] == ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.zeros(2, 23), "is torch.float32; whole numbers are supported"),
        (torch.zeros(2, 1, dtype=torch.int64), r"has the sizes \(2, 1\); the site has 2 sequences of 23 keys"),
        (torch.zeros(3, 23, dtype=torch.int64), "has the sizes"),
        (None, 'reads no input that the call names "document_ids"; it has "x"'),
    ],
)
def test_what_is_no_number_for_each_key_is_refused(ids: Tensor | None, sentence: str) -> None:
    def call(x: Tensor, document_ids: Tensor | None) -> Tensor:
        found: Tensor = Layer()(x) if document_ids is None else Layer()(x, ids=document_ids)
        return found

    with pytest.raises(BackendCompilerFailed, match=sentence):
        compiled(call, torch.randn(2, 23, 32), ids, policy=policy(Documents(ids="document_ids")))


def test_one_of_the_four_is_needed() -> None:
    for given in ({}, {"ids": "a", "positions": "b"}, {"ids": "a", "lengths": (3,)}, {"ids": 3}):
        with pytest.raises(PolicyError):
            Documents(**given)  # type: ignore[arg-type]
