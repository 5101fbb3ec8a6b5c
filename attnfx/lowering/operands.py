"""What the flash kernels can be given: dimensions, dtypes, shapes and dropout, checked before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor


def check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    """Raises ValueError that says what was found and what is supported."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; the flash kernels take 4 each")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; supported: one of float16, bfloat16, float32")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} key heads; supported: a multiple")
    for name, size in (("head_dim", q.shape[3]), ("value dim", v.shape[3])):
        if not 1 <= size <= 256:
            raise ValueError(f"{name} is {size}; supported: 1 to 256")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; supported: 0 to 1")
    if dropout_p > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError("dropout needs a seed: an int64 tensor of one element")
