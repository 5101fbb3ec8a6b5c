"""Run as a script under TRITON_INTERPRET=1: the kernels of linear attention in float32; prints distances by case as JSON."""

from __future__ import annotations

import json

import torch
from linear_cases import SMALL, distances

from attnfx.lowering.linear import ops

if __name__ == "__main__":
    assert ops._has_kernel(torch.zeros(1))
    print(json.dumps({case.name: distances(case, torch.float32, ways=((0, 1, 2, 3),)) for case in SMALL}))
