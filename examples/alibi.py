"""ALiBi as BLOOM and MPT write it, one number for each key: what is derived, that the numbers are eager's, and what it costs here.

python examples/alibi.py
"""

import torch
from torch.utils.benchmark import Timer
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

import attnfx
from attnfx.testing import peak_bytes

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
length = 8192 if device == "cuda" else 1024
models = {
    "BLOOM": BloomForCausalLM(
        BloomConfig(vocab_size=1000, hidden_size=256, n_layer=2, n_head=8, attn_implementation="eager"),
    ),
    "MPT": MptForCausalLM(
        MptConfig(vocab_size=1000, d_model=256, n_layers=2, n_heads=8, max_seq_len=length, attn_implementation="eager"),
    ),
}
tokens = torch.randint(0, 1000, (1, length), device=device)
print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}, {length} tokens, 2 layers, 8 heads, float32")

for name, model in models.items():
    torch._dynamo.reset()
    model = model.eval().to(device)
    compiled = torch.compile(model, backend="attnfx")
    with torch.no_grad():
        report = attnfx.explain(model, tokens, use_cache=False)
        print(f"{name}: {report.sites[0].site}")
        for line in report.sites[0].biases:
            print(f"  {line}")
        eager = model(tokens, use_cache=False).logits
        ours = compiled(tokens, use_cache=False).logits
        print(f"  largest difference from eager: {(ours - eager).abs().max():.1e} (logits up to {eager.abs().max():.2f})")
        for how, run in (("eager", model), ("attnfx", compiled)):
            call = Timer("run(tokens, use_cache=False)", globals={"run": run, "tokens": tokens})
            memory = peak_bytes(lambda run=run: run(tokens, use_cache=False), device) / 2**20
            print(f"  {how:6}  {call.timeit(5).median * 1e3:8.1f} ms  {memory:8.0f} MiB at the peak")
    assert len(report.sites) == 2
    assert all(site.rewritten and len(tensor.shape) < 4 for site in report.sites for tensor in site.site.side)
    assert torch.allclose(ours, eager, rtol=1e-3, atol=1e-4)
