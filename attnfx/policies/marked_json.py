"""JSON with the line of each key. Duplicate keys and numbers that JSON does not have are refused."""

from __future__ import annotations

import json
import re
from typing import Any

from attnfx.policies.marked import DEEPEST, LONGEST_NUMBER, MOST_VALUES, Marked, Place, Unreadable, too_deep, too_many, twice

_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"(?P<number>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)|true|false|null", re.ASCII)
_CONSTANTS = {"true": True, "false": False, "null": None}


def parse(text: str) -> Marked:
    """The data of a JSON text. Raises Unreadable."""
    reader = _Reader(text)
    data = reader.value((), 0)
    reader.skip()
    if reader.at < len(text):
        raise reader.wrong("more follows after the end")
    return Marked(data, reader.lines)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.values = text, 0, 0
        self.lines: dict[Place, int] = {}
        self._counted = (0, 1)

    def line(self) -> int:
        """The line of the place reached."""
        begin, line = self._counted
        self._counted = self.at, line + self.text.count("\n", begin, self.at)
        return self._counted[1]

    def wrong(self, what: str) -> Unreadable:
        return Unreadable(f"it is not JSON: {what}", self.line())

    def skip(self) -> str:
        """The next character after spaces."""
        found = _SPACE.match(self.text, self.at)
        assert found
        self.at = found.end()
        return self.text[self.at : self.at + 1]

    def value(self, place: Place, depth: int) -> Any:
        first = self.skip()
        self.lines.setdefault(place, self.line())
        self.values += 1
        if depth > DEEPEST:
            raise too_deep(self.line())
        if self.values > MOST_VALUES:
            raise too_many(self.line())
        if first == "{":
            return self.table(place, depth)
        if first == "[":
            return self.array(place, depth)
        if first == '"':
            return self.string()
        found = _SCALAR.match(self.text, self.at)
        if not found:
            raise self.wrong(f"{first!r} begins no value" if first else "it ends where a value must stand")
        if len(found[0]) > LONGEST_NUMBER:
            raise self.wrong(f"a number has {len(found[0])} digits")
        self.at = found.end()
        return json.loads(found[0]) if found["number"] else _CONSTANTS[found[0]]

    def string(self) -> str:
        try:
            found, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError as problem:
            self.at = max(self.at, problem.pos)
            raise self.wrong(problem.msg) from None
        return str(found)

    def table(self, place: Place, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        if self.skip() == "}":
            self.at += 1
            return found
        while True:
            if self.skip() != '"':
                raise self.wrong("a key in double quotes must stand here")
            line, key = self.line(), self.string()
            if key in found:
                raise twice(key, line)
            self.lines[*place, key] = line
            if self.skip() != ":":
                raise self.wrong('a ":" must follow the key')
            self.at += 1
            found[key] = self.value((*place, key), depth + 1)
            if self.ended("}"):
                return found

    def array(self, place: Place, depth: int) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        if self.skip() == "]":
            self.at += 1
            return found
        while True:
            found.append(self.value((*place, len(found)), depth + 1))
            if self.ended("]"):
                return found

    def ended(self, sign: str) -> bool:
        """Whether a table or an array ends here; else a comma was read."""
        following = self.skip()
        if following not in (sign, ","):
            raise self.wrong(f'a "," or a "{sign}" must stand here')
        self.at += 1
        return following == sign
