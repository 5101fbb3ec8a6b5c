"""Feature maps of linear attention as torch operations: what queries and keys become before their product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, always positive (Katharopoulos et al. 2020, arXiv:2006.16236)."""
    return functional.elu(x) + 1.0


def cosine(x: Tensor) -> Tensor:
    """(1, x / |x|), whose products are 1 + cos(q, k) and never negative (Li et al. 2020, arXiv:2007.14902)."""
    return functional.pad(functional.normalize(x, dim=-1), (0, 1), value=1.0)


def softmax_pair(x: Tensor, weight: Tensor | None) -> Tensor:
    """(softmax(x W), softmax(-x W)), with ``weight`` (H,D,F) or none, which is the identity (Hedgehog, arXiv:2402.04347)."""
    y = x if weight is None else torch.matmul(x, weight)
    return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)


def taylor_width(width: int) -> int:
    """How many features :func:`taylor2` has."""
    return 1 + width + width * (width // 2 + 1)


def taylor2(x: Tensor, width: int) -> Tensor:
    """Features (.., `taylor_width`, and zeros up to a multiple of 16) whose products are 1 + z + z^2 / 2 with z = x.y.

    The squares are the products of x and x turned by r, for r up to half the width: each pair of elements once.
    """
    half = width // 2
    turned = torch.cat([x, x], -1).unfold(-1, width, 1)[..., : half + 1, :]  # [.., r, i] is x[i + r mod width]
    turned = turned * torch.unsqueeze(x, -2)
    by = [0.5**0.5 if r == 0 or 2 * r == width else 1.0 for r in range(half + 1)]
    # a list of numbers would be a tensor that a graph has to hold
    ends = [turned[..., :1, :] * by[0], turned[..., 1:half, :], turned[..., half:, :] * by[half]]
    squares = torch.flatten(torch.cat(ends if half > 0 else ends[:1], -2), -2)
    made = torch.cat([x, squares], -1)
    made = functional.pad(made, (0, 1), value=1.0)
    return functional.pad(made, (0, -taylor_width(width) % 16))
