"""Export: the attention operators are in the program, in the saved one and in the loaded one, and the numbers agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from graphs import assert_same
from torch import Tensor, fx, nn

import attnfx

RUN = """
import sys, torch, attnfx.lowering.vendor
program = torch.export.load(sys.argv[1])
x, pad, want = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x, pad=pad)["out"], want, rtol=1e-4, atol=1e-5)
assert "attnfx.backend" not in sys.modules and "attnfx.patterns" not in sys.modules
"""


class Model(nn.Module):
    """A causal attention with a learned bias per distance and key padding, and a plain one; keyword and nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.slope = nn.Linear(8, 24), nn.Parameter(torch.randn(2, 1, 1))
        self.register_buffer("shift", torch.randn(1))

    def forward(self, x: Tensor, pad: Tensor) -> dict[str, Tensor]:
        q, k, v = self.qkv(x + self.shift).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        i = torch.arange(x.shape[1])
        scores = q @ k.transpose(-1, -2) * 0.5 + self.slope * (i - i[:, None])
        scores = scores.masked_fill((i > i[:, None]) | ~pad[:, None, None], float("-inf"))
        return {"out": x + (scores.softmax(-1) @ v + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)}


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    pad = torch.ones(batch, length, dtype=torch.bool)
    pad[-1, length - 2 :] = False
    return torch.randn(batch, length, 8), pad


def operators(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "attnfx" in str(n.target)]


BOTH = ["attnfx.attention.default", "attnfx.vendor_attention.default"]


def test_saved_loaded_and_run_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (x, pad) = Model(), inputs(2, 7)
    sizes: Any = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = attnfx.export(model, (x,), {"pad": pad}, dynamic_shapes={"x": sizes, "pad": sizes}, strict=True)
    assert sorted(operators(program.graph)) == BOTH
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert sorted(operators(loaded.graph)) == BOTH
    x, pad = inputs(3, 11)
    want = model(x, pad)["out"].detach()
    assert_same(loaded.module()(x, pad=pad)["out"], want)
    assert_same(loaded.run_decompositions().module()(x, pad=pad)["out"], want)
    torch.save((x, pad, want), tmp_path / "data.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")]
    done = subprocess.run([sys.executable, "-c", RUN, *files], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_rewritten_module_shares_and_trains_the_model_s_parameters() -> None:
    torch.manual_seed(0)
    model, (x, pad) = Model(), inputs(2, 7)
    module = attnfx.rewritten(model, (x,), {"pad": pad}, strict=True)
    assert sorted(operators(module.graph)) == BOTH
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    gradients = []
    for call in (module, model):
        model.zero_grad()
        out = call(x, pad=pad)["out"]
        out.square().sum().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 4
    assert_same(gradients[0], gradients[1], 1e-4)
