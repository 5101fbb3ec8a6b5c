"""Give the lower layers a sliding window by a policy: the model stays as it is, and the report says what changed.

python examples/window_policy.py
"""

import torch
from transformers import LlamaConfig, LlamaModel

import attnfx

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)
model = LlamaModel(config).eval()
tokens = torch.randint(0, config.vocab_size, (1, 260))

window = attnfx.variants.SlidingWindow(window=64, sinks=4)
policy = attnfx.Policy([attnfx.Rule("layers.[0-1].*", window)])  # layers 2 and 3 match no rule: they stay exact

with torch.no_grad():
    for site in attnfx.explain(model, tokens, policy=policy, use_cache=False).sites:
        print(f"{site.module:24} {'exact' if site.exact else site.variant}")

    exact = model(tokens, use_cache=False).last_hidden_state
    compiled = attnfx.compile(model, policy=policy)
    windowed = compiled(tokens, use_cache=False).last_hidden_state

change = (windowed - exact).norm(dim=-1) / exact.norm(dim=-1)
print(f"relative change of the output: {change[0, :64].max():.1e} within the window, {change[0, 64:].max():.1e} beyond")
assert change[0, :64].max() < 1e-4 < change[0, 64:].max()
