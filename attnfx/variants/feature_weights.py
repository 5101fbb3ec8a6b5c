"""The file of trained feature maps: by module path a "query" and a "key" weight (H,D,F); loading it runs no code."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, tuple[Tensor, Tensor]]


def load(path: str) -> Weights | str:
    """The weights (query, key) by module path, or a sentence that says what is wrong. A file is read again when it was written."""
    try:
        written = os.stat(path).st_mtime_ns
    except OSError as error:
        return f'The feature maps cannot be read from "{path}": {error.strerror}.'
    return _load(os.path.abspath(path), written)


@lru_cache(maxsize=8)
def _load(path: str, written: int) -> Weights | str:
    from torch.utils._python_dispatch import _disable_current_modes

    try:
        with torch._guards.tracing(None), _disable_current_modes():  # in a compile, torch.load gives fake tensors
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
        return {str(module): (_weight(maps["query"]), _weight(maps["key"])) for module, maps in data.items()}
    except Exception as error:  # a file of any other kind
        return f'"{path}" holds no feature maps: {type(error).__name__}: {str(error).partition(chr(10))[0]}'


def _weight(given: Tensor) -> Tensor:
    if given.dim() != 3 or not given.is_floating_point():
        raise ValueError(f"a weight is {given.dtype} of shape {tuple(given.shape)}; it must be (H, D, F) of a floating type")
    return given
