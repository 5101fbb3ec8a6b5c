"""Versions that do not go together, as far as it is known: what fails, and what helps, as sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

Version = tuple[int, ...]
TORCH = ((2, 11), (2, 14))
"""The versions of torch that attnfx is tested with: from the first, below the second."""


@dataclass(frozen=True)
class Pair:
    """Versions, by package, that fail together, and the sentence that says so."""

    versions: Mapping[str, Callable[[Version], bool]]
    sentence: str


BAD = (
    Pair(
        {"triton": lambda v: v < (3, 7), "numpy": lambda v: v >= (2, 4)},
        "Triton's interpreter (TRITON_INTERPRET=1) before 3.7 fails under NumPy 2.4: it takes int() of an array. Kernels on a GPU "
        "are not concerned; for the interpreter install numpy<2.4.",
    ),
    Pair(
        {"torch": lambda v: v[:2] == (2, 11)},
        "torch 2.11's scaled_dot_product_attention ends the process on a CPU where there are no heads; later versions do not.",
    ),
)


def known(installed: Mapping[str, str], required: Iterable[str] | None = None) -> tuple[str, ...]:
    """What is known against the versions ``installed``, by package; ``required``: what torch's own distribution asks for."""
    found = []
    numbers = {name: number for name, text in installed.items() if (number := _number(text))}
    torch = numbers.get("torch")
    if torch is not None and not TORCH[0] <= torch[:2] < TORCH[1]:
        between = " to below ".join(".".join(map(str, v)) for v in TORCH)
        found.append(f"torch {installed['torch']} is not one of those that attnfx is tested with, {between}.")
    asked = _asked(_of_torch() if required is None else required)
    if asked and "triton" in numbers and numbers["triton"][:2] != _number(asked)[:2]:
        found.append(
            f"torch {installed.get('torch', '')} was released with Triton {asked}, and {installed['triton']} is installed: "
            f"compiled kernels may fail. Install triton=={asked}."
        )
    for pair in BAD:
        if all(name in numbers and holds(numbers[name]) for name, holds in pair.versions.items()):
            found.append(pair.sentence)
    return tuple(found)


def _number(text: str) -> Version:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _asked(required: Iterable[str]) -> str:
    """The version of Triton among requirements such as ``triton==3.7.1; platform_system == "Linux"``; '' where there is none."""
    found = (re.match(r"triton(?:-rocm)?\s*\(?==\s*([\w.]+)", line) for line in required)
    return next((match.group(1) for match in found if match), "")


def _of_torch() -> list[str]:
    try:
        return metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return []
