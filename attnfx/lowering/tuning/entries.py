"""What a search found, as the plain data of a file, read back with every field checked: a file may come from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from attnfx.lowering.configs import Choice, Config, Tile

#: The values that each field of a configuration may have in a file.
_BLOCKS = (16, 32, 64, 128, 256)
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "block_m": _BLOCKS, "block_n": _BLOCKS, "num_warps": (1, 2, 4, 8, 16), "num_stages": tuple(range(1, 9)),
    "tma": (False, True), "splits": tuple(range(129)),
}  # fmt: skip
#: What is measured to be allowed to spill belongs to the shipped defaults.
_UNWRITTEN = "spills"


class EntryError(ValueError):
    """Data that is no entry; the message says what was found and what is expected."""


@dataclass(frozen=True)
class Entry:
    """The fastest configuration of one kernel, its milliseconds and those of the shipped one, what it is for, when it was found,
    how many were timed, and how many were not, by reason."""

    choice: Choice
    ms: float
    default_ms: float
    about: str = ""
    found: str = ""
    timed: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"config": choice_to_data(self.choice), "ms": self.ms, "default_ms": self.default_ms}
        return data | {"about": self.about, "found": self.found, "timed": self.timed, "dropped": dict(self.dropped)}


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of a plain attention, forward and backward together, by the vendor's kernels and by the generated ones."""

    vendor_ms: float
    generated_ms: float
    about: str = ""
    found: str = ""

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


Remembered = Entry | Comparison


def read(data: Any) -> Remembered:
    """The entry that ``to_data`` wrote. Raises EntryError."""
    if not isinstance(data, dict):
        raise EntryError(f"an entry is {type(data).__name__}; it is an object")
    try:
        about, found = _text(data, "about"), _text(data, "found")
        if "vendor_ms" in data:
            return Comparison(_milliseconds(data, "vendor_ms"), _milliseconds(data, "generated_ms"), about, found)
        times = _milliseconds(data, "ms"), _milliseconds(data, "default_ms")
        dropped = data["dropped"]
        if not isinstance(dropped, dict) or not all(type(n) is int for n in (data["timed"], *dropped.values())):
            raise EntryError(f"timed and dropped are {data['timed']!r}, {dropped!r}; they are numbers")
        return Entry(choice_from_data(data["config"]), *times, about, found, data["timed"], dropped)
    except KeyError as missing:
        raise EntryError(f"an entry has no {missing}") from None


def choice_to_data(choice: Choice) -> dict[str, Any]:
    """A configuration as JSON."""
    return {name: value for name, value in asdict(choice).items() if name != _UNWRITTEN}


def choice_from_data(data: Any) -> Choice:
    """The configuration that :func:`choice_to_data` wrote. Raises EntryError for an unknown field and for a value out of range."""
    if isinstance(data, dict):
        for kind in (Config, Tile):
            names = {f.name for f in fields(kind)} - {_UNWRITTEN}
            if data.keys() == names:
                for name, value in data.items():
                    if value not in _ALLOWED[name] or type(value) is not type(_ALLOWED[name][0]):
                        raise EntryError(f"{name} is {value!r}; it is one of {', '.join(map(str, _ALLOWED[name]))}")
                return kind(**data)
    raise EntryError(f"a configuration is {data!r}; it has the fields of a Config or of a Tile")


def _milliseconds(data: Mapping[str, Any], name: str) -> float:
    value = data[name]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise EntryError(f"{name} is {value!r}; it is a time in milliseconds")
    return float(value)


def _text(data: Mapping[str, Any], name: str) -> str:
    if not isinstance(data[name], str):
        raise EntryError(f"{name} is {data[name]!r}; it is a text")
    return str(data[name])
