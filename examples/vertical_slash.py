"""The prefill of a long prompt by columns and diagonals of attention, and the decoding after it as it was.

A Llama as transformers has it, with biases of queries and keys, as some of its kind are trained with. Rotated by positions they
look at distances, a different one in each head: so attention gets heavy diagonals, which VerticalSlash finds by the last queries
before each segment. These weights are made up; trained models have such heads of their own.

python examples/vertical_slash.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnfx
from attnfx.variants import SlidingWindow, VerticalSlash

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=300,
    attention_bias=True,
    initializer_range=0.1,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, heads, turn in ((attention.q_proj, 8, 0.0), (attention.k_proj, 4, 4.0)):
            angle = turn * torch.rand(heads)  # of a pair of channels that positions turn by 1 in 316 tokens
            projection.bias.zero_()
            projection.bias.view(heads, 2, 8)[..., 5] = 15 * torch.stack([angle.cos(), angle.sin()], 1)
prompt = torch.randint(0, config.vocab_size, (1, 3072))

found = VerticalSlash(vertical_size=32, slash_size=256, last_q=32, segment=256, sinks=4, local=32, block=32)
variants = {"columns and diagonals": found, "a window of more work": SlidingWindow(640, sinks=32)}
errors = {}
with torch.no_grad():
    for name, variant in variants.items():
        policy = attnfx.Policy([attnfx.Rule("model.layers.*", variant, phase="prefill")])
        checked = attnfx.verify(model, prompt, policy=policy, use_cache=False)
        errors[name] = checked.worst
        print(f"{name}: relative error of the logits {checked.worst:.3f}\n{checked.report}\n")
    decode = attnfx.explain(model, prompt[:, :1], past_key_values=model(prompt).past_key_values, policy=policy)
print(f"the decoding after it\n{decode}")
assert errors["columns and diagonals"] < errors["a window of more work"] / 2
assert not any(site.exact for site in checked.report.sites)
assert all(site.exact for site in decode.sites)
