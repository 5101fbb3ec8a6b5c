"""OpenFold's triangle attention, as transformers' ESMFold holds it: a learned bias for each pair of residues, and padding.

python examples/pair_bias.py
"""

import torch
from torch.utils.benchmark import Timer
from transformers.models.esm.modeling_esmfold import EsmFoldTriangleAttention

import attnfx
from attnfx.testing import peak_bytes

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
residues = 384 if device == "cuda" else 128
model = EsmFoldTriangleAttention(c_in=64, c_hidden=16, no_heads=4).to(device)
for parameter in model.parameters():  # its output starts as zeros
    torch.nn.init.normal_(parameter, std=0.2)
pairs = torch.randn(1, residues, residues, 64, device=device, requires_grad=True)
mask = torch.ones(1, residues, residues, device=device)
mask[..., -residues // 8 :] = 0  # the last residues are padding
compiled = torch.compile(model, backend="attnfx")

(site,) = attnfx.explain(model, pairs, mask=mask).sites
print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}, {residues} residues, 4 heads, float32, training")
print(site.site)
for line in site.biases:
    print(f"  {line}")


def step(run):
    """Output, and the gradients of the pairs and of all parameters, by name."""
    found = run(pairs, mask=mask)
    leaves = {"pairs": pairs, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(found.square().sum(), list(leaves.values()))
    return {"output": found.detach(), **dict(zip(leaves, gradients, strict=True))}


eager, ours = step(model), step(compiled)
least = 1e-3 * float(eager["pairs"].abs().max())  # gradients that are zero but for rounding
errors = {name: float((ours[name] - t).abs().max() / t.abs().max().clamp(min=least)) for name, t in eager.items()}
print(f"largest relative error of output and gradients: {max(errors.values()):.1e}")
print(f"of the weight that makes the pair bias: {errors['linear.weight']:.1e}")
for how, run in (("eager", model), ("attnfx", compiled)):
    memory = peak_bytes(lambda run=run: step(run), device) / 2**20
    time = Timer("step(run)", globals={"step": step, "run": run}).timeit(5).median * 1e3
    print(f"{how:6}  {time:8.1f} ms  {memory:8.0f} MiB at the peak of a step")
assert site.rewritten
assert max(errors.values()) < 1e-3
