"""A layer as linear attention by a policy, and the same operator by hand: a state that continues a sequence.

Replacing a softmax changes the function, and such layers are trained or distilled afterwards: the policy's model is put through a
few steps of training here, gradients through the chunked operator included.

python examples/linear_attention.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnfx
from attnfx.variants import LinearAttention

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)
model = LlamaForCausalLM(config)
policy = attnfx.Policy([attnfx.Rule("model.layers.1.*", LinearAttention("elu"))])
tokens = torch.arange(0, 513).remainder(64)[None]  # what comes next is one more

print(attnfx.explain(model, tokens, policy=policy, use_cache=False), "\n")
compiled = attnfx.compile(model, policy=policy, inner="aot_eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for _ in range(8):
    loss = compiled(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
print("loss of the model with one linear layer:", ", ".join(f"{loss:.2f}" for loss in losses))
assert losses[-1] < 0.8 * losses[0]

# the operator itself: half of a sequence, and the rest from the state that the first half leaves
q, k, v = (torch.rand(1, 4, 512, 16, dtype=torch.float64) for _ in range(3))
decay = -torch.rand(4, dtype=torch.float64) / 32
whole = torch.ops.attnfx.linear_attention(q, k, v, decay)
first, _, state, _ = torch.ops.attnfx.linear_attention_states(*(x[:, :, :256] for x in (q, k, v)), decay)
second = torch.ops.attnfx.linear_attention(*(x[:, :, 256:] for x in (q, k, v)), decay, state=state)
error = float((torch.cat([first, second], 2) - whole).abs().max())
print(f"two halves, joined by a state of {state[0, 0].numel()} numbers a head, differ from the whole by {error:.1e}")
assert error < 1e-10
