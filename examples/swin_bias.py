"""Swin's table of relative positions, trained: it stays a small table, and so does its gradient.

python examples/swin_bias.py
"""

import torch
from torch.utils.benchmark import Timer
from transformers import SwinConfig, SwinModel

import attnfx
from attnfx.testing import peak_bytes

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = SwinConfig(image_size=224, embed_dim=48, depths=[2], num_heads=[2], window_size=7, drop_path_rate=0.0)
model = SwinModel(config, add_pooling_layer=False).to(device)  # the second block shifts its windows and masks what wraps around
for name, parameter in model.named_parameters():
    if name.endswith("relative_position_bias_table"):
        torch.nn.init.normal_(parameter)
images = torch.randn(8 if device == "cuda" else 2, 3, 224, 224, device=device)
compiled = torch.compile(model, backend="attnfx")

report = attnfx.explain(model, images)
print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}, {len(images)} images of 224 x 224, float32, training")
for site in report.sites:
    print(f"{site.module}: {site.site.batch} windows of {site.site.queries} tokens")
    for line in site.biases:
        print(f"  {line}")


def step(run):
    """The gradients of one training step by name."""
    model.zero_grad()
    run(images).last_hidden_state.sin().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


eager, ours = step(model), step(compiled)
tables = [name for name in eager if name.endswith("relative_position_bias_table")]
for name in tables:
    error = (ours[name] - eager[name]).abs().max() / eager[name].abs().max()
    print(f"gradient of {name} {tuple(eager[name].shape)}: {error:.1e} from eager's")
for how, run in (("eager", model), ("attnfx", compiled)):
    memory = peak_bytes(lambda run=run: step(run), device) / 2**20
    time = Timer("step(run)", globals={"step": step, "run": run}).timeit(5).median * 1e3
    print(f"{how:6}  {time:8.1f} ms  {memory:8.0f} MiB at the peak of a step")
assert len(report.sites) == len(tables) == 2
assert all(site.rewritten for site in report.sites)
largest = max(float(gradient.abs().max()) for gradient in eager.values())
for name, gradient in eager.items():
    assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-5 * largest), name
