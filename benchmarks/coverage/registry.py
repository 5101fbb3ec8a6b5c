"""Real models by name: what builds each of them, small and seeded, from an installed package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

#: The modules of this package that register cases, in the order of the table.
SOURCES = ("text", "vision", "audio", "composed", "others")


@dataclass(frozen=True)
class Case:
    """One model: ``package`` has to be importable, ``spelling`` says what is particular about its attention."""

    name: str
    package: str
    spelling: str
    make: Callable[[], Built]

    def build(self) -> Built:
        """The model in evaluation mode and the arguments of one forward. Raises ImportError without the package."""
        _torchvision()
        importlib.import_module(self.package)
        torch.manual_seed(0)
        model, args, kwargs = self.make()
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                if parameter.is_floating_point() and parameter.numel() and not parameter.any():
                    # A projection that starts at zero would hide its attention from the comparison.
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype))
        return model.eval(), args, kwargs


def _torchvision() -> None:
    """Make torchvision importable beside a torch that its compiled operators do not fit: the models here use none of them."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
CASES: dict[str, Case] = {}


def case(name: str, package: str, spelling: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register the decorated function as a case. Raises ValueError for a name that is taken."""

    def register(make: Callable[[], Built]) -> Callable[[], Built]:
        if name in CASES:
            raise ValueError(f"two cases are called {name}")
        CASES[name] = Case(name, package, spelling, make)
        return make

    return register


def load() -> dict[str, Case]:
    """Every case; the packages themselves are imported when a case is built."""
    for source in SOURCES:
        importlib.import_module(f"benchmarks.coverage.{source}")
    return CASES


def tokens(batch: int = 2, length: int = 32, vocabulary: int = 90) -> Tensor:
    """int64 (batch, length)."""
    return torch.randint(3, vocabulary, (batch, length))


def padding(batch: int = 2, length: int = 32, lost: int = 6) -> Tensor:
    """int64 (batch, length) of ones; the last row ends in ``lost`` zeros."""
    kept = torch.ones(batch, length, dtype=torch.int64)
    kept[-1, length - lost :] = 0
    return kept


def image(size: int = 32, batch: int = 2) -> Tensor:
    """float32 (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size)
