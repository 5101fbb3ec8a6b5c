"""Every variant by a policy in an unmodified model of transformers, which gives what it gives with the oracle for its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import compiled
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertModel, LlamaConfig, LlamaModel
from variant_cases import EXAMPLES, HEADS, WIDTH

from attnfx.api import verify
from attnfx.measure import difference
from attnfx.policy import Policy, Rule
from attnfx.variants import dense
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


def attention(example: Example, errors: list[float] | None = None) -> Callable[..., Any]:
    """The oracle as transformers' attention; with ``errors`` the model's own softmax, beside which the oracle's error is noted."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **others: Any) -> Any:
        out = example.variant.reference(q.double(), k.double(), v.double(), scaling, causal=example.causal)
        if errors is not None:
            kept = dense.seen(q.shape[2], k.shape[2], example.causal, None, q.device)
            own = dense.attention(q.double(), k.double(), v.double(), scaling, kept)
            errors.append(difference(out, own))
            out = own
        return out.to(q.dtype).transpose(1, 2).contiguous(), None

    return attend


@pytest.mark.parametrize("example", WHOLE.values(), ids=WHOLE)
def test_a_model_under_a_policy_is_the_model_with_the_oracle(example: Example) -> None:
    """In its output, and in the error that verification tells of each attention on the model's own operands."""
    variant, errors = example.variant, list[float]()
    ids = torch.randint(0, 53, (2, example.queries), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        AttentionInterface.register("oracle", attention(example))
        want = run(model_of(example, "oracle"), ids)
        AttentionInterface.register("oracle", attention(example, errors))
        run(model_of(example, "oracle"), ids)
        model = model_of(example, "sdpa")
        got, report = compiled(lambda ids: run(model, ids), ids, policy=Policy([Rule("**.*", variant)]), verify=True)
    assert [type(site.variant) for site in report.sites] == [type(variant)] * 2
    assert not any(site.exact for site in report.sites)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    measured = [site.measured.error for site in report.sites if site.measured is not None]
    assert measured == pytest.approx(errors, rel=1e-3, abs=1e-6)
    assert all(site.measured is not None and site.measured.bound is None for site in report.sites)


def test_verify_tells_the_error_of_the_output() -> None:
    """That of the model with the oracle, and of its attentions."""
    example = WHOLE["SlidingWindow"]
    ids = torch.randint(0, 53, (2, example.queries))
    AttentionInterface.register("oracle", attention(example))
    with torch.no_grad():
        model, oracle = model_of(example, "sdpa"), model_of(example, "oracle")
        found = verify(model, ids, policy=[Rule("**.*", example.variant)], use_cache=False)
        want = difference(run(oracle, ids), run(model, ids))
    assert found.worst == pytest.approx(want, rel=1e-3)
    assert want > 0.01
    assert [m.error > 0.01 for m in found.sites.values()] == [True, True]
