"""A long-context policy as a file: windows with sinks, but only where the keys are many, and dense layers first.

A Llama as transformers has it. The rule's condition is a guard: the model is compiled once for short inputs and once for long ones,
however many lengths there are.

python examples/long_context.py
"""

import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

import attnfx

POLICY = """
[[rules]]
modules = "layers.0.*"
variant = "keep"

[[rules]]
modules = "layers.*"
when = "kv_len >= 1024"
variant = { name = "SlidingWindow", window = 128, sinks = 4 }
"""

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=1000,
)
model = LlamaModel(config).eval()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "policy.toml"
    path.write_text(POLICY, encoding="utf-8")
    policy = attnfx.Policy.load(path)


def seconds(call: object, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    call(tokens, use_cache=False)  # type: ignore[operator]
    return time.perf_counter() - start


with torch.no_grad():
    for length in (300, 3000):
        tokens = torch.randint(0, config.vocab_size, (1, length))
        print(f"{length} tokens")
        for site in attnfx.explain(model, tokens, policy=policy, use_cache=False).sites:
            print(f"  {site.module:20} {'exact' if site.exact else site.variant}: {site.reason}")
    compiled = attnfx.compile(model, policy=policy, dynamic=True)
    for length in (300, 500, 1500, 3000):
        tokens = torch.randint(0, config.vocab_size, (1, length))
        exact = model(tokens, use_cache=False).last_hidden_state
        ours = compiled(tokens, use_cache=False).last_hidden_state
        change = float((ours - exact).norm() / exact.norm())
        print(f"{length:5} tokens: relative change of the output {change:.1e}")
        assert (change < 1e-4) == (length < 1024)
    eager, ours = seconds(model, tokens), min(seconds(compiled, tokens) for _ in range(3))
    print(f"{length:5} tokens: eager {eager:.2f} s, compiled under the policy {ours:.2f} s")
