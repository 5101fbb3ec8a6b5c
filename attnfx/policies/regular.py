"""Regular expressions over short texts, matched by sets of states: the time is that of the text's length times the expression's.

Python's own engine tries one way after the other, so that `(a+)+b` takes longer than anybody waits; here all ways are followed at
once (Thompson 1968, Regular Expression Search Algorithm).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

_LONGEST, _DEEPEST, _MOST_REPEATS, _MOST_PARTS = 500, 10, 100, 4_000
_COUNTED = re.compile(r"\{(\d+)(,?)(\d*)\}")
_CLASS = re.compile(r"\^?\]?(?:\\.|[^\]\\\[])*+\]")


class Malformed(ValueError):
    """What is wrong with an expression, as the end of a sentence."""


@dataclass(frozen=True)
class Char:
    """One character: this one, or one that a pattern matches."""

    test: str | re.Pattern[str]


@dataclass(frozen=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """`part`, `least` times or more, but `most` times at most where that is a number."""

    part: Node
    least: int = 0
    most: int | None = None


Node = Char | Sequence | Choice | Repeat

ANY = Char(re.compile(".", re.DOTALL))


def words(texts: Iterable[str]) -> Node:
    """Any one of `texts`; what they begin with alike is followed once."""
    grouped = [(first, [text[1:] for text in rest]) for first, rest in groupby(sorted(set(texts)), lambda text: text[:1])]
    parts = tuple(Sequence((Char(first), words(rest))) if first else Sequence(()) for first, rest in grouped)
    return parts[0] if len(parts) == 1 else Choice(parts)


class Program:
    """An expression as states: where a state has a test, a character that passes it leads on; else it leads on at once."""

    def __init__(self, node: Node, most_parts: int | None = None) -> None:
        self._tests: list[str | re.Pattern[str] | None] = [None]
        self._nexts: list[list[int]] = [[]]  # the first state is the end
        self._most, self._parts = most_parts, 0
        self._start = self._built(node, 0)

    def matches(self, text: str) -> bool:
        """Whether the expression describes the whole of `text`."""
        states = self._closed([self._start])
        for character in text:
            states = self._closed([n for state in states if self._passes(state, character) for n in self._nexts[state]])
            if not states:
                return False
        return 0 in states

    def _passes(self, state: int, character: str) -> bool:
        test = self._tests[state]
        return test == character if isinstance(test, str) else test is not None and test.match(character) is not None

    def _closed(self, states: list[int]) -> set[int]:
        """`states` and all that they lead to without a character."""
        found: set[int] = set()
        while states:
            state = states.pop()
            if state not in found:
                found.add(state)
                if self._tests[state] is None:
                    states += self._nexts[state]
        return found

    def _state(self, test: str | re.Pattern[str] | None, nexts: list[int]) -> int:
        self._tests.append(test)
        self._nexts.append(nexts)
        return len(self._tests) - 1

    def _built(self, node: Node, after: int) -> int:
        """The state at which `node` begins, where the state `after` follows it."""
        self._parts += 1
        if self._most is not None and self._parts > self._most:
            raise Malformed(f"its repeats multiply to more than {self._most} parts")
        match node:
            case Char():
                return self._state(node.test, [after])
            case Choice():
                return self._state(None, [self._built(part, after) for part in node.parts])
            case Sequence():
                for part in reversed(node.parts):
                    after = self._built(part, after)
                return after
        begin = after
        if node.most is None:
            begin = self._state(None, [after])
            self._nexts[begin].append(self._built(node.part, begin))
        for _ in range((node.most or node.least) - node.least):
            begin = self._state(None, [self._built(node.part, begin), after])
        for _ in range(node.least):
            begin = self._built(node.part, begin)
        return begin


def compiled(text: str) -> Program:
    """The expression that `text` spells (:func:`parse`). Raises Malformed."""
    return Program(parse(text), _MOST_PARTS)


def parse(text: str) -> Node:
    """What `text` spells: characters, `.`, `\\d \\w \\s`, classes, groups, `|`, and `* + ? {m,n}`. Raises Malformed."""
    if len(text) > _LONGEST:
        raise Malformed(f"it has {len(text)} characters, and may have {_LONGEST}")
    parser = _Parser(text)
    node = parser.choice(0)
    if parser.at < len(text):
        raise Malformed(f'the ")" at character {parser.at + 1} closes no "("')
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def choice(self, depth: int) -> Node:
        if depth > _DEEPEST:
            raise Malformed(f"its groups are nested more than {_DEEPEST} deep")
        parts = [self.sequence(depth)]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            parts.append(self.sequence(depth))
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(self.atom(depth)))
        return Sequence(tuple(parts))

    def repeated(self, node: Node) -> Node:
        sign = self.text[self.at : self.at + 1]
        plain = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if sign in plain:
            self.at += 1
            return Repeat(node, *plain[sign])
        if sign != "{":
            return node
        found = _COUNTED.match(self.text, self.at)
        if not found:
            raise Malformed(f'the "{{" at character {self.at + 1} begins no number of repeats such as "{{2}}" or "{{1,3}}"')
        least, comma, last = found.groups()
        most = int(least) if not comma else int(last) if last else None
        if int(least) > _MOST_REPEATS or (most is not None and not int(least) <= most <= _MOST_REPEATS):
            raise Malformed(f'"{found[0]}" at character {self.at + 1} must rise and stay below {_MOST_REPEATS + 1}')
        self.at = found.end()
        return Repeat(node, int(least), most)

    def atom(self, depth: int) -> Node:
        begin, character = self.at + 1, self.text[self.at]
        self.at += 1
        reader: dict[str, Callable[[], Node]] = {"[": self.bracket, "\\": self.escape, ".": lambda: ANY}
        if character in reader:
            return reader[character]()
        if character == "(":
            if self.text[self.at : self.at + 1] == "?":
                if self.text[self.at : self.at + 2] != "?:":
                    raise Malformed(f'the group at character {begin} begins with "(?"; groups are "(...)" or "(?:...)"')
                self.at += 2
            inside = self.choice(depth + 1)
            if self.text[self.at : self.at + 1] != ")":
                raise Malformed(f'the "(" at character {begin} is never closed')
            self.at += 1
            return inside
        if character in "*+?{":
            raise Malformed(f'the "{character}" at character {begin} repeats nothing')
        if character in "^$":
            raise Malformed(f'the "{character}" at character {begin} says nothing, because the whole path has to match')
        return Char(character)

    def escape(self) -> Node:
        character = self.text[self.at : self.at + 1]
        if not character or (character.isalnum() and character not in "dDwWsS"):
            raise Malformed(f'the "\\{character}" at character {self.at} is not supported')
        self.at += 1
        return Char(re.compile(f"\\{character}"))

    def bracket(self) -> Node:
        found = _CLASS.match(self.text, self.at)
        if not found:
            raise Malformed(f'the "[" at character {self.at} is never closed, or holds another "["')
        try:
            pattern = re.compile("[" + re.sub(r"([&~|]){2}", r"\\\1\\\1", found[0]))
        except re.error as problem:
            raise Malformed(f'"[{found[0]}" is not a class of characters ({problem.msg})') from None
        self.at = found.end()
        return Char(pattern)
