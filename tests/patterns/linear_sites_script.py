"""Run as a script under TRITON_INTERPRET=1: models of linear attention through the kernels; prints decisions and distances."""

from __future__ import annotations

import json

import torch
from linear_models import LinearTransformer, TorchscaleRetNet
from test_linear_sites import compiled, gradients, made, tokens

from attnfx.lowering.linear import ops

if __name__ == "__main__":
    assert ops._has_kernel(torch.zeros(1))
    found = {}
    for kind in (LinearTransformer, TorchscaleRetNet):
        model, x = made(kind), tokens(70)[:1].requires_grad_()
        got, report = compiled(model, x)
        want = model(x)
        pairs = zip((got, *gradients(model, got, x)), (want, *gradients(model, want, x)), strict=True)
        found[kind.__name__] = [s.decision for s in report.sites], [float((a - b).norm() / b.norm()) for a, b in pairs]
    print(json.dumps(found))
