"""Tensor descriptors for the copy engine of Hopper and later: which tensors can have one, and how it is made."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

#: Targets that have the engine.
TARGETS = ("sm90", "sm100", "sm120")
#: Rows from which on a descriptor, which the host writes at each launch, pays.
ROWS = 512
_ALIGNED = 16


def serves(target: str, x: Tensor) -> bool:
    """Whether tiles of ``x`` (B,H,S,D) are read faster by a descriptor, and can be: half precision, the last axis dense, every
    other stride positive and a multiple of 16 bytes."""
    if target not in TARGETS or x.dtype.itemsize != 2 or x.shape[2] < ROWS or x.stride(-1) != 1 or x.numel() == 0:
        return False
    if x.device.type != "meta" and x.data_ptr() % _ALIGNED:
        return False
    return all(s > 0 and s * x.element_size() % _ALIGNED == 0 for s in _strides(x)[:-1])


def describe(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """``x`` (B,H,S,D) in tiles of ``rows`` x ``dim`` of one head."""
    return TensorDescriptor(x, list(x.shape), _strides(x), [1, 1, rows, dim])


def describe_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """``x`` (2,B*H,M), contiguous, float32, in tiles of ``rows`` numbers; M is a multiple of ``rows``, which is one of 16."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows])


def _strides(x: Tensor) -> list[int]:
    """The strides, with one that the engine takes where an axis of one element has any."""
    fits = max(_ALIGNED // x.element_size(), x.shape[-1] // 8 * 8)
    return [fits if n == 1 and axis < x.dim() - 1 else s for axis, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))]


def type_of(x: TensorDescriptor) -> str:
    """Triton's name of a descriptor's type."""
    kinds = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return f"tensordesc<{kinds[x.base.dtype]}{list(x.block_shape)}>"
