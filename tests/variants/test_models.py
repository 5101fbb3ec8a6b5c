"""Every variant by a policy in an unmodified model of transformers, which gives what it gives with the oracle for its attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import compiled
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertModel, LlamaConfig, LlamaModel
from variant_cases import EXAMPLES, HEADS, WIDTH

from attnfx.policy import Policy, Rule
from attnfx.variants.base import Example

#: Of each variant the first that a plain model without a cache has, which has as many queries as keys.
WHOLE: dict[str, Example] = {}
for example in EXAMPLES.values():
    if example.plain and example.queries == example.keys:
        WHOLE.setdefault(type(example.variant).__name__, example)


def model_of(example: Example, attention: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 53, "hidden_size": HEADS * WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "attn_implementation": attention,
    }  # fmt: skip
    if example.causal:
        return LlamaModel(LlamaConfig(**sizes, num_key_value_heads=example.key_heads)).eval()
    return BertModel(BertConfig(**sizes, max_position_embeddings=2048), add_pooling_layer=False).eval()


def run(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(ids)[0]
    return found


@pytest.mark.parametrize("example", WHOLE.values(), ids=WHOLE)
def test_a_model_under_a_policy_is_the_model_with_the_oracle(example: Example) -> None:
    variant = example.variant

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **others: Any) -> Any:
        out = variant.reference(q.double(), k.double(), v.double(), scaling, causal=example.causal)
        return out.to(q.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", attend)
    ids = torch.randint(0, 53, (2, example.queries), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = run(model_of(example, "oracle"), ids)
        model = model_of(example, "sdpa")
        got, report = compiled(lambda ids: run(model, ids), ids, policy=Policy([Rule("**.*", variant)]))
    assert [type(site.variant) for site in report.sites] == [type(variant)] * 2
    assert not any(site.exact for site in report.sites)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
