"""What `attnfx doctor` finds out: what is installed, which lowering runs here, what the kernels compile to."""

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from rich.table import Table

import attnfx
from attnfx import versions
from attnfx.errors import UnknownOption, listing, nearest

PACKAGES = ("torch", "triton", "numpy", "sympy", "transformers")
TARGETS = ("sm80", "sm90", "sm100", "gfx942")
COLUMNS = (
    "template",
    "program",
    "dtype",
    "head_dim",
    "target",
    "registers",
    "spills",
    "shared",
    "limit",
    "ok",
    "error",
)


def installed() -> dict[str, str]:
    """Versions and devices by name, and the lowering that they lead to."""
    return {
        "attnfx": attnfx.__version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "C++ compiler": _compiler(),
        "backend": _backend(),
        "device": _device(),
        "lowering": _lowering(),
        "tuned": _tuned(),
        "known problems": " ".join(problems()) or "none known of these versions",
    }


def problems() -> tuple[str, ...]:
    """What is known against the versions that are installed here, as sentences."""
    return versions.known({name: _version(name) for name in PACKAGES})


def checked(targets: Sequence[str], doing: Callable[[str], None] = lambda what: None) -> list[dict[str, Any]]:
    """Compile every kernel for the targets; a row for each, whose "ok" says that it fits, and on sm90 does not spill.

    `doing` is told what goes on, target by target: this takes minutes.
    """
    for target in targets:
        if target not in TARGETS:
            raise UnknownOption(f'"{target}" is no target; there are {listing(TARGETS)}.{nearest(target, TARGETS)}')
    from attnfx.lowering import crosscompile

    numbers = {target: number for number, target in enumerate(targets, 1)}

    def begun(target: str) -> None:
        doing(f"compiling the kernels for {target} (target {numbers[target]} of {len(targets)})")

    # all in one call: its processes take seconds to begin, and none waits for the last kernel of a target
    return [{column: getattr(row, column) for column in COLUMNS} for row in crosscompile.check(targets, begun=begun)]


def kernels_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `checked`, those that fail in red."""
    table = Table(*(column.replace("_", " ") for column in COLUMNS), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        cells = ["yes" if row[column] is True else "no" if row[column] is False else str(row[column]) for column in COLUMNS]
        table.add_row(*cells, style=None if row["ok"] else "red")
    return table


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    found = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    return found or "none found; torch.compile on a CPU needs one (g++ or clang++)"


def _backend() -> str:
    if any(entry.name == "attnfx" for entry in metadata.entry_points(group="torch_dynamo_backends")):
        return 'torch.compile(model, backend="attnfx") works without importing attnfx'
    return "the package is not installed, only importable: use attnfx.compile(model), or install it"


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _lowering() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no GPU here" if built else f"torch {torch.__version__} is built for CPUs only"
        return f"portable (torch operations, block by block), and SDPA where attention is plain, because {why}"
    if _version("triton") == "not installed":
        return "portable (torch operations, block by block), and SDPA where attention is plain, because Triton is not installed"
    if torch.cuda.get_device_capability()[0] < 8 and torch.version.hip is None:
        return "Triton kernels, and SDPA where attention is plain; they are compiled and tested for sm80 and later"
    return "Triton kernels, and SDPA where the vendor's kernel is faster on plain attention"


def _tuned() -> str:
    if not torch.cuda.is_available() or _version("triton") == "not installed":
        return "nothing: kernels are tuned on a GPU"
    from attnfx.lowering.tuning import cache

    who = cache.identity(torch.device("cuda", torch.cuda.current_device()))
    assert who is not None
    return f"{len(cache.load(who))} entries in {who.path}"
