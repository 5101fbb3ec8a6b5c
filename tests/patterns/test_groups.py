"""Grouped-query attention is told apart however few queries there are: the fold of its heads says which axis is which."""

import pytest
import torch
from torch.nn import functional

import attnfx

KEYS = 40


def _mask(kind, queries):
    at = torch.arange(KEYS)
    keep = at[None, :] - torch.arange(queries)[:, None] < 20 if kind == "of both" else (at >= 12)[None, :]
    return None if kind == "none" else keep


def _sdpa(q, k, v, mask):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _eager(q, k, v, mask):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


@pytest.mark.parametrize("attend", [_sdpa, _eager])
@pytest.mark.parametrize("mask", ["none", "of keys", "of both"])
@pytest.mark.parametrize(("batch", "queries", "heads", "key_heads"), [(1, 1, 8, 2), (2, 3, 8, 2)])
def test_groups_larger_than_the_queries(attend, mask, batch, queries, heads, key_heads):
    q, k, v = (torch.randn(batch, h, n, 8) for h, n in ((heads, queries), (key_heads, KEYS), (key_heads, KEYS)))

    def model(q, k, v):
        return attend(q, k, v, _mask(mask, queries))

    torch._dynamo.reset()
    report = attnfx.explain(model, q, k, v)
    assert [(int(s.site.queries), int(s.site.heads), int(s.site.key_heads)) for s in report.sites] == [(queries, heads, key_heads)]
    expected = model(q.double(), k.double(), v.double())
    found = torch.compile(model, backend="attnfx")(q, k, v)
    assert (found - expected).abs().max() < 1e-5
