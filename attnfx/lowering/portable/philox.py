"""The dropout mask in torch operations, bit for bit what the Triton kernels draw (`dropout_scale` in templates/tiles.py)."""

from __future__ import annotations

import torch
from torch import Tensor

KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
LOW = 0xFFFFFFFF
ROUNDS = 10


def dropout_scale(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, heads: int, probability: float) -> Tensor:
    """1 / (1 - p) where an element survives, else 0, float32, on the broadcast grid of index tensors.

    One counter (j, i, b * H + h) an element.
    """
    uniform = _uniform(_philox(seed, j, i, b * heads + h))
    kept = 1.0 / (1.0 - probability) if probability < 1.0 else 0.0
    # both sides in float32, as in the kernel
    threshold = torch.full((), probability, dtype=torch.float32, device=uniform.device)
    return torch.where(uniform >= threshold, kept, 0.0).float()


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """The first word of Philox 4x32-10 for the counter (c0, c1, c2, 0). Words are int64 tensors of 32 bits."""
    key = seed.reshape(()).to(torch.int64)
    k0, k1 = key & LOW, (key >> 32) & LOW
    c0, c1, c2 = c0 & LOW, c1 & LOW, c2 & LOW
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        # the product wraps in 64 bits: the high word is right after the sign is masked off
        product_a, product_b = c0 * ROUND_A, c2 * ROUND_B
        c0, c2 = ((product_b >> 32) & LOW) ^ c1 ^ k0, ((product_a >> 32) & LOW) ^ c3 ^ k1
        c1, c3 = product_b & LOW, product_a & LOW
        k0, k1 = (k0 + KEY_A) & LOW, (k1 + KEY_B) & LOW
    return c0


def _uniform(word: Tensor) -> Tensor:
    """A 32-bit word as a float32 in [0, 1)."""
    signed = torch.where(word >= 2**31, LOW - word, word)
    return signed.to(torch.float32) * 4.6566127342e-10
