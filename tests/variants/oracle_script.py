"""Run as a script under TRITON_INTERPRET=1: the examples of the variants through the real kernels on the CPU, in float32.

python oracle_script.py NAME...          prints for each example of these variants its distance from the oracle as JSON
python oracle_script.py --few NAME...    for the first two examples of each
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch
from variant_cases import EXAMPLES, applied, oracle, tensors_of


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, by the size of what is wanted; infinite where only one of them is NaN."""
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    return float((got.double() - want).nan_to_num().abs().max() / want.nan_to_num().abs().max().clamp(min=1e-3))


def main(names: list[str]) -> None:
    found = {}
    left = Counter({name: 2 if "--few" in names else len(EXAMPLES) for name in names})
    for name, example in EXAMPLES.items():
        kind = type(example.variant).__name__
        if left[kind] > 0:
            left[kind] -= 1
            tensors = tensors_of(example, torch.float32)
            wide = [t.double().requires_grad_() for t in tensors]
            want = oracle(example, *wide)
            leaves = [t.requires_grad_(example.learns) for t in tensors]
            got = applied(example, *leaves)
            found[name] = [distance(got.detach(), want.detach())]
            if example.learns:
                by = torch.randn(want.shape)
                pairs = zip(torch.autograd.grad(got, leaves, by), torch.autograd.grad(want, wide, by.double()), strict=True)
                found[name] += [distance(mine, theirs) for mine, theirs in pairs]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
