"""Linear attention on a GPU: the kernels in the types in which they walk, forward and backward, several segments and blocks."""

import pytest
import torch
from linear_cases import CASES, Case, distances

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LONG = [
    Case("long", 3000, 3000, 128, 128, 4, 4, batch=1),
    Case("long, decay", 3000, 3000, 128, 64, 4, 2, decays=True, begun=True, batch=1, scale=0.1, beside=True),
    Case("long, normalised", 2999, 2999, 64, 128, 4, 4, normalize=True, begun=True, batch=1, beside=True),
    Case("long and wide", 2000, 2000, 256, 64, 2, 2, decays=True, batch=1, scale=0.1),
    Case("long, wide values", 2000, 2000, 72, 200, 2, 1, decays=True, normalize=True, batch=1),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.keys] + LONG, ids=lambda c: c.name)
def test_kernels_are_the_formula(case, dtype):
    far = {name: d for name, d in distances(case, dtype, "cuda").items() if not d < 0.03}
    assert not far, far
