"""TOML with the line of each key. Python's reader gives the data; where the keys stand is found by reading the text once more."""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress

from attnfx.policies.marked import DEEPEST, LONGEST_NUMBER, MOST_VALUES, Marked, Place, Unreadable, too_deep, too_many

_STRING = r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}" + r'|"(?:\\.|[^"\\\n])*+"|' + r"'[^'\n]*+'"
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})|(?P<open>[\"'].*)|(?P<comment>#[^\n]*)|(?P<space>[ \t\r]+)|"
    r"(?P<bare>[^\s\"'#\[\]{}=,.]+)|(?P<sign>.)",
    re.DOTALL,
)
_AT = re.compile(r"\(at line (\d+), column \d+\)")


def parse(text: str) -> Marked:
    """The data of a TOML text. Raises Unreadable."""
    text = text.replace("\r\n", "\n")
    tokens = _tokens(text)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        found = _AT.search(str(problem))
        what = _AT.sub("", str(problem)).strip().rstrip(".")
        raise Unreadable(f"it is not TOML: {what}", int(found[1]) if found else 0) from None
    finder = _Finder(tokens)
    with suppress(IndexError):  # the data is read; that a line is not known spoils nothing
        finder.document()
    return Marked(data, finder.lines)


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, text, line) of all tokens but spaces and comments; what is nested too deep is refused here, because Python's reader
    takes long for it."""
    tokens: list[tuple[str, str, int]] = []
    depth, dots, line = 0, 0, 1
    for found in _TOKEN.finditer(text):
        kind, token = str(found.lastgroup), found[0]
        if kind not in ("space", "comment"):
            tokens.append((kind, token, line))
        if kind == "bare" and len(token) > LONGEST_NUMBER and token.lstrip("+-").isdecimal():
            raise Unreadable(f"it is not TOML: a number has {len(token)} digits", line)
        if kind == "sign":
            depth += (token in "[{") - (token in "]}")
            dots = dots + 1 if token == "." else 0
        if depth > DEEPEST or dots > DEEPEST:
            raise too_deep(line)
        if len(tokens) > 6 * MOST_VALUES:
            raise too_many(line)
        line += token.count("\n")
    return tokens


class _Finder:
    """A walk over the tokens of a text that is known to be TOML."""

    def __init__(self, tokens: list[tuple[str, str, int]]) -> None:
        self.tokens, self.at = [*tokens, ("sign", "\n", 0)], 0
        self.lines: dict[Place, int] = {(): 1}
        self._counts: dict[Place, int] = {}

    @property
    def sign(self) -> str:
        """The sign at hand, or '' where there is none."""
        kind, token, _ = self.tokens[self.at]
        return token if kind == "sign" else ""

    def document(self) -> None:
        table: Place = ()
        while self.at < len(self.tokens) - 1:
            if self.sign == "\n":
                self.at += 1
            elif self.sign == "[":
                table = self.header()
            else:
                self.pair(table)

    def header(self) -> Place:
        line, many = self.tokens[self.at][2], self.tokens[self.at + 1][1] == "["
        self.at += 2 if many else 1
        place = self.resolved(self.key())
        if many:
            count = self._counts.get(place, 0)
            self._counts[place] = count + 1
            self.lines.setdefault(place, line)
            place = (*place, count)
        self.lines[place] = line
        self.at += 2 if many else 1
        return place

    def resolved(self, key: Place) -> Place:
        """A key of a header, with the last table of each list of tables that it leads through."""
        place: Place = ()
        for n, part in enumerate(key):
            place = (*place, part)
            if n < len(key) - 1 and place in self._counts:
                place = (*place, self._counts[place] - 1)
        return place

    def key(self) -> Place:
        parts: list[str | int] = []
        while True:
            kind, token, _ = self.tokens[self.at]
            self.at += 1
            parts.append(next(iter(tomllib.loads(f"{token} = 0"))) if kind == "string" else token)
            if self.sign != ".":
                return tuple(parts)
            self.at += 1

    def pair(self, table: Place) -> None:
        line, place = self.tokens[self.at][2], table
        for part in self.key():
            place = (*place, part)
            self.lines.setdefault(place, line)
        self.at += 1  # the "="
        self.value(place)

    def value(self, place: Place) -> None:
        self.lines.setdefault(place, self.tokens[self.at][2])
        if self.sign in ("[", "{"):
            (self.array if self.sign == "[" else self.inline)(place)
            return
        while self.sign not in ("\n", ",", "]", "}"):
            self.at += 1

    def array(self, place: Place) -> None:
        count = 0
        self.at += 1
        while self.sign != "]":
            if self.sign in ("\n", ","):
                self.at += 1
                continue
            self.value((*place, count))
            count += 1
        self.at += 1

    def inline(self, place: Place) -> None:
        self.at += 1
        while self.sign != "}":
            if self.sign in ("\n", ","):
                self.at += 1
                continue
            self.pair(place)
        self.at += 1
