"""Compile an unmodified Llama: one argument changes, the numbers do not.

python examples/llama.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
)
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, config.vocab_size, (1, 300))

compiled = torch.compile(model, backend="attnfx")

with torch.no_grad():
    eager = model(tokens, use_cache=False).logits
    ours = compiled(tokens, use_cache=False).logits

print(f"largest difference from eager: {(ours - eager).abs().max():.1e} (logits up to {eager.abs().max():.2f})")
assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5)
