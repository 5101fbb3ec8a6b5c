"""Run as a script under TRITON_INTERPRET=1: the kernel that scores pages beside torch's operations, a JSON line an example."""

from __future__ import annotations

import json
import sys

import torch

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx.lowering.page_scores import page_scores

#: Keys, keys of a page, head_dim.
CASES = ((200, 16, 16), (200, 5, 24), (100, 128, 80), (33, 1, 16), (64, 64, 128), (7, 16, 16))


def operands(keys: int, width: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    key = torch.randn(2, keys, 3, width).to(torch.bfloat16).transpose(1, 2)
    return key.to(device), torch.randn(2, 3, 1, width).to(device)


def error(keys: int, page: int, width: int, device: str = "cpu") -> float:
    """The largest difference from torch's operations."""
    key, by = operands(keys, width, device)
    return float((torch.ops.attnfx.page_scores(key, by, page) - page_scores(key, by, page)).abs().max())


def main() -> None:
    for case in CASES:
        print(json.dumps({"name": str(case), "errors": {"scores": error(*case)}}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
