"""Run as a script under TRITON_INTERPRET=1: the kernels of linear attention in float32; prints distances by case as JSON."""

from __future__ import annotations

import json
from unittest import mock

import torch
from linear_cases import SMALL, distances

from attnfx.lowering.linear import kernels, ops

if __name__ == "__main__":
    assert ops._has_kernel(torch.zeros(1))
    found = {case.name: distances(case, torch.float32, ways=((0, 1, 2, 3),)) for case in SMALL}
    # half precision alone walks, which would hide small errors; several segments, of several blocks
    walks = property(lambda call: call.causal)
    with mock.patch.object(kernels._Call, "walks", walks), mock.patch.object(kernels, "SHORTEST", 64):
        for case in SMALL:
            if case.causal:
                found[f"{case.name}, walked"] = distances(case, torch.float32, ways=((0, 1, 2, 3),))
    print(json.dumps(found))
