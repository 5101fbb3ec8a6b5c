"""The file that fitted networks are kept in: tensors and numbers by module path, which loading does not run as code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnfx.biases.pair_network import PairNetwork

FORMAT = 1
_NUMBERS = ("heads", "error", "largest", "size")


def save(path: str | os.PathLike[str], networks: Mapping[str, PairNetwork]) -> None:
    """Write ``networks`` by module path, in one step."""
    modules = {
        module: {name: getattr(n, name) for name in _NUMBERS} | {"query": list(n.query), "key": list(n.key)}
        for module, n in networks.items()
    }
    target = Path(path)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    torch.save({"attnfx pair networks": FORMAT, "modules": modules}, beside)
    os.replace(beside, target)


def load(path: str) -> Mapping[str, PairNetwork] | str:
    """The networks in a file, or a sentence that says what is wrong with it. A file is read again when it was written."""
    try:
        written = os.stat(path).st_mtime_ns
    except OSError as error:
        return f'The networks cannot be read from "{path}": {error.strerror}.'
    return _load(os.path.abspath(path), written)


@lru_cache(maxsize=8)
def _load(path: str, written: int) -> Mapping[str, PairNetwork] | str:
    from torch.utils._python_dispatch import _disable_current_modes

    try:
        with torch._guards.tracing(None), _disable_current_modes():  # in a compile, torch.load gives fake tensors
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
        if data["attnfx pair networks"] != FORMAT:
            return f'"{path}" has the format {data["attnfx pair networks"]!r}; known is {FORMAT}.'
        return {module: _network(fields) for module, fields in data["modules"].items()}
    except Exception as error:  # a file of any other kind
        return f'"{path}" holds no fitted networks: {type(error).__name__}: {str(error).partition(chr(10))[0]}'


def _network(fields: Mapping[str, Any]) -> PairNetwork:
    query, key = (tuple(t.float() for t in fields[name]) for name in ("query", "key"))
    heads, (error, largest, size) = int(fields["heads"]), (float(fields[name]) for name in _NUMBERS[1:])
    found = PairNetwork(query, key, heads, error, largest, size)
    for layers in (query, key):
        widths = [t.shape for t in layers]
        linked = all(a[0] == b[0] == c[1] for a, b, c in zip(widths[0::2], widths[1::2], widths[2::2], strict=False))
        if len(layers) % 2 or not linked or layers[-1].shape[0] != heads * found.rank or layers[0].shape[1] % 3:
            raise ValueError(f"layers of shapes {[tuple(w) for w in widths]} for {heads} heads")
    return found
