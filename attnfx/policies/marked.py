"""Files of plain data, TOML, YAML or JSON, with the line of each key; what is too large or too deep is refused."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnfx.errors import PolicyError, listing

FORMATS = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
"""Which format a suffix means."""
MOST_BYTES, MOST_VALUES, DEEPEST, LONGEST_NUMBER = 256 * 1024, 20_000, 12, 40

Place = tuple[str | int, ...]
"""The keys and positions that lead to a value: ("rules", 0, "variant")."""


class Unreadable(Exception):
    """What is wrong with a text as the end of a sentence, and in which line (0: not known)."""

    def __init__(self, what: str, line: int = 0) -> None:
        super().__init__(what)
        self.what, self.line = what, line


@dataclass(frozen=True)
class Marked:
    """Data, and the lines at which its keys stand, counted from 1."""

    data: Any
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest one around it that has one; 0 where none is known."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 0)


def format_of(path: Path) -> str:
    """The format of a file by its suffix."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise PolicyError(f'The policy file {path} has the suffix "{path.suffix}"; known are {listing(FORMATS)}.')
    return found


def read(path: Path) -> Marked:
    """The data of a file. Raises PolicyError where the file cannot be read, and Unreadable for what is wrong with its text."""
    format = format_of(path)
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            raise PolicyError(
                f"The policy file {path} cannot be read: it is {'a folder' if stat.S_ISDIR(kind) else 'no plain file'}."
            )
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as problem:  # a path with a null character is a ValueError
        if isinstance(problem, PolicyError):
            raise
        raise PolicyError(f"The policy file {path} cannot be read: {getattr(problem, 'strerror', None) or problem}.") from None
    return parse(content, format)


def parse(content: bytes, format: str) -> Marked:
    """The data of a file's bytes. Raises Unreadable."""
    if len(content) > MOST_BYTES:
        raise Unreadable(f"it is larger than {MOST_BYTES // 1024} KiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise Unreadable(f"byte {problem.start} ({content[problem.start]:#04x}) is not UTF-8", line) from None
    from attnfx.policies import marked_json, marked_toml, marked_yaml

    found = {"toml": marked_toml.parse, "yaml": marked_yaml.parse, "json": marked_json.parse}[format](text)
    _check_text(found, found.data, ())
    return found


def _check_text(marked: Marked, data: Any, place: Place) -> None:
    """Refuse halves of surrogate pairs, which escapes can spell and no file can hold."""
    if isinstance(data, dict):
        for key, value in data.items():
            _check_text(marked, key, (*place, key))
            _check_text(marked, value, (*place, key))
    elif isinstance(data, list):
        for n, value in enumerate(data):
            _check_text(marked, value, (*place, n))
    elif isinstance(data, str) and any("\ud800" <= character <= "\udfff" for character in data):
        raise Unreadable("a text holds half of a surrogate pair", marked.line(place))


def too_deep(line: int) -> Unreadable:
    """What is said of data nested deeper than any policy is."""
    return Unreadable(f"it is nested more than {DEEPEST} deep", line)


def too_many(line: int) -> Unreadable:
    """What is said of more values than any policy has."""
    return Unreadable(f"it has more than {MOST_VALUES} values", line)


def twice(key: str, line: int) -> Unreadable:
    """What is said of a key that a table has twice."""
    return Unreadable(f'the key "{key[:60]}" is there twice', line)
