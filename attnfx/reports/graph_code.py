"""Two graphs as one listing of code, each line marked as common to both, removed or new."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

#: Longer lines, the arguments of a model's graph, are broken at their commas.
_LONGEST = 400


def listing(before: str, after: str) -> str:
    """Every line of both with a mark in front, as in a diff with the whole text for context: " ", "-" or "+"."""
    old, new = list(_lines(before)), list(_lines(after))
    parts: list[str] = []
    for tag, a, b, c, d in _matched(old, new):
        if tag == "equal":
            parts += (f" {line}" for line in old[a:b])
        else:
            parts += (f"-{line}" for line in old[a:b])
            parts += (f"+{line}" for line in new[c:d])
    return "\n".join(parts)


def _matched(old: list[str], new: list[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """The operations that make ``new`` of ``old``. Lines that each side has once divide the texts first: repeated layers make
    most lines common, and comparing all of them with one another takes time that grows with its square."""
    anchors = _anchors(old, new)
    a = c = 0
    for x, y in (*anchors, (len(old), len(new))):
        for tag, i, j, k, m in difflib.SequenceMatcher(None, old[a:x], new[c:y], autojunk=False).get_opcodes():
            yield tag, a + i, a + j, c + k, c + m
        if x < len(old):
            yield "equal", x, x + 1, y, y + 1
        a, c = x + 1, y + 1


def _anchors(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """Lines that each side has once, in an order that both have."""
    places: list[dict[str, int]] = []
    for lines in (old, new):
        seen: dict[str, int] = {}
        for at, line in enumerate(lines):
            seen[line] = -1 if line in seen else at
        places.append(seen)
    found, last = [], -1
    for line, at in places[0].items():
        there = places[1].get(line, -1)
        if at >= 0 and there > last:
            found.append((at, there))
            last = there
    return found


def _lines(code: str) -> Iterator[str]:
    for line in code.splitlines():
        if len(line) <= _LONGEST:
            yield line
            continue
        head, *rest = line.replace("; ", ";\0    ").replace(", ", ",\0        ").split("\0")
        yield head
        yield from rest
