"""The file of what was found on a device: readable JSON, one for each device and set of versions, below $ATTNFX_CACHE_DIR.

Several processes may write: a file is read, merged and replaced under a lock, and replaced whole. What cannot be read, or is from
other versions than its name says, is set aside under another name with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from attnfx import __version__
from attnfx.errors import AttnfxError, AttnfxWarning
from attnfx.files import replace_file
from attnfx.lowering.tuning.entries import EntryError, Remembered, read

SCHEMA = 1
#: Seconds that a writer waits for another one.
PATIENCE = 20.0
Entries = Mapping[str, Remembered]


@dataclass(frozen=True)
class Identity:
    """What measurements hold for: the device, the versions of torch, Triton and attnfx, and a hash of the kernels' own source."""

    device: str
    torch: str
    triton: str
    attnfx: str
    kernels: str

    @property
    def path(self) -> Path:
        """Its file."""
        from attnfx.lowering.codegen import cache_directory

        device = "-".join("".join(c if c.isalnum() else " " for c in self.device).split())
        name = f"{device}--torch-{self.torch}--triton-{self.triton}--attnfx-{self.attnfx}-{self.kernels}.json"
        return cache_directory() / "tuned" / name

    def __str__(self) -> str:
        return f"{self.device}, torch {self.torch}, triton {self.triton}, attnfx {self.attnfx} with kernels {self.kernels}"


def identity(device: torch.device) -> Identity | None:
    """Of a GPU; None for a CPU and for meta tensors, where nothing is measured."""
    return _identity(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@lru_cache
def _identity(name: str) -> Identity:
    import triton

    return Identity(name, torch.__version__.partition("+")[0], triton.__version__.partition("+")[0], __version__, _kernels())


@lru_cache
def _kernels() -> str:
    """A hash of everything that is compiled into every kernel: of other kernels other configurations are the fastest."""
    from attnfx.lowering import templates

    files = sorted(Path(folder) / name for folder in templates.__path__ for name in os.listdir(folder) if name.endswith(".py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def load(who: Identity) -> dict[str, Remembered]:
    """What the file of ``who`` holds; nothing where there is none, or none that can be read."""
    try:
        return _parsed(who.path.read_text(encoding="utf-8"), who)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn(f"the file for {who} cannot be read: {error}")
    except ValueError:
        try:
            with _locked(who):  # nobody who writes it is half-way now
                return _load_or_set_aside(who)
        except (OSError, Timeout) as error:
            _warn(f"the file for {who} cannot be read, nor set aside: {error}")
    return {}


def add(who: Identity, found: Entries, keep: bool = False) -> dict[str, Remembered]:
    """Merge ``found`` into the file of ``who``; an entry that is there is replaced, unless ``keep``. All entries, as they are now.

    Where the file cannot be written, what was found holds for this process, and a warning says so.
    """
    try:
        with _locked(who):
            known = _load_or_set_aside(who)
            merged = {**found, **known} if keep else {**known, **found}
            replace_file(who.path, written(who, merged))
            return merged
    except (OSError, Timeout) as error:
        _warn(f"the file for {who} cannot be written ({error}); what was found is forgotten when this process ends")
        return {**load(who), **found}


def written(who: Identity, entries: Entries) -> str:
    """The text of a file."""
    data = {name: entries[name].to_data() for name in sorted(entries)}
    return json.dumps({"attnfx tuned": SCHEMA, "for": asdict(who), "entries": data}, indent=1) + "\n"


def import_file(path: Path, who: Identity, force: bool = False) -> int:
    """Merge a file that somebody exported; how many entries are new. What was measured here is kept.

    Raises AttnfxError where the file cannot be read, or was made on another device or with other versions, unless ``force``.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = _parsed(text, None if force else who)
    except OSError as error:
        raise AttnfxError(f"{path} cannot be read: {error.strerror or error}.") from None
    except _Foreign as error:
        raise AttnfxError(f"{path} was made {error}; --force imports it all the same.") from None
    except ValueError as error:
        raise AttnfxError(f"{path} is not a file of tuned configurations: {error}.") from None
    before = load(who)
    return len(add(who, entries, keep=True).keys() - before.keys())


@contextmanager
def searching(who: Identity, seconds: float) -> Iterator[bool]:
    """Whether this process may search now; waits for another one that does, at most so many seconds."""
    try:
        lock = FileLock(_beside(who, ".search"), timeout=seconds)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:  # a folder that cannot be written to has no other searchers
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


class _Foreign(ValueError):
    """A file for another device or other versions."""


def _parsed(text: str, who: Identity | None) -> dict[str, Remembered]:
    """The entries of a file for ``who``, or for whoever. Raises ValueError."""
    try:
        data: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(data, dict) or data.keys() != {"attnfx tuned", "for", "entries"}:
        raise ValueError('it is no object with "attnfx tuned", "for" and "entries"')
    if data["attnfx tuned"] != SCHEMA:
        raise ValueError(f"its format is {data['attnfx tuned']!r}; this version reads {SCHEMA}")
    if who is not None and data["for"] != asdict(who):
        made = Identity(**data["for"]) if _is_identity(data["for"]) else data["for"]
        raise _Foreign(f"for {made}; this is {who}")
    if not isinstance(data["entries"], dict):
        raise ValueError(f"its entries are {type(data['entries']).__name__}; they are an object")
    try:
        return {name: read(entry) for name, entry in data["entries"].items()}
    except EntryError as error:
        raise ValueError(str(error)) from None


def _is_identity(data: Any) -> bool:
    return isinstance(data, dict) and data.keys() == set(Identity.__dataclass_fields__)


def _load_or_set_aside(who: Identity) -> dict[str, Remembered]:
    """The entries of the file; one that is broken gets another name. The caller holds the lock."""
    try:
        return _parsed(who.path.read_text(encoding="utf-8"), who)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        number, aside = 1, who.path.with_name(f"{who.path.name}.set-aside")
        while aside.exists():
            number, aside = number + 1, who.path.with_name(f"{who.path.name}.set-aside-{number + 1}")
        os.replace(who.path, aside)
        _warn(f"{who.path.name} is not read, because of this: {error}. It is now {aside}")
        return {}


def _locked(who: Identity) -> FileLock:
    return FileLock(_beside(who, ".lock"), timeout=PATIENCE)


def _beside(who: Identity, ending: str) -> Path:
    path = who.path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}{ending}")


def _warn(text: str) -> None:
    warnings.warn(f"Tuned configurations: {text}.", AttnfxWarning, stacklevel=4)
