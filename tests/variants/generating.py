"""`model.generate` of an unmodified Llama under a policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from variant_cases import HEADS, WIDTH

from attnfx.backend import attnfx, listeners
from attnfx.policy import Policy, Rule
from attnfx.report import Report
from attnfx.variants.base import Variant


def generated(
    rules: Variant | Policy | None, ids: Tensor, mask: Tensor, tokens: int = 4, layers: int = 1, **options: Any
) -> tuple[Tensor, list[Report]]:
    """The scores of each step of a Llama, and a report for each graph; without rules nothing is compiled."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=HEADS * WIDTH, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model, reports = LlamaForCausalLM(config).eval(), list[Report]()
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    try:
        if rules is not None:
            given = {"inner": "eager", "strict": True, "policy": rules if isinstance(rules, Policy) else Policy([Rule("*", rules)])}
            model.forward = torch.compile(model.forward, backend=attnfx, options=given)
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, output_scores=True,
                return_dict_in_generate=True, **options,
            )  # fmt: skip
    finally:
        listeners.reset(token)
    return torch.stack(made.scores), reports
