"""Patterns of module paths: globs as in the shell, whose brackets may also hold ranges of whole numbers, or regular expressions."""

import re
from dataclasses import dataclass, field

from attnfx.errors import PolicyError
from attnfx.policies import regular

_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_LONGEST, _MOST_NUMBERS = 1_000, 10_000
REGEX = "re:"
"""What a regular expression begins with."""


@dataclass(frozen=True)
class Glob:
    """A pattern such as "model.layers.[0-31].*"; PolicyError says what is malformed and where.

    `*` is any run of characters, dots included; `?` one character; `[0-31]` and `[0,4,8-11]` a whole number in these
    ranges; any other bracket, `[abc]`, `[!a-c]` or `[12]`, one character of the class. After "re:" stands a regular
    expression (:func:`attnfx.policies.regular.parse`). The whole path has to match, and no pattern takes long.
    """

    text: str
    _program: regular.Program = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise PolicyError(f'The module glob is {self.text!r}; it must be text such as "model.layers.[0-3].*" or "*".')
        program = _regex(self.text) if self.text.startswith(REGEX) else regular.Program(_translate(self.text))
        object.__setattr__(self, "_program", program)

    def matches(self, module: str) -> bool:
        """Whether the whole module path fits the glob."""
        return self._program.matches(module)


def _regex(text: str) -> regular.Program:
    try:
        return regular.compiled(text.removeprefix(REGEX))
    except regular.Malformed as problem:
        raise PolicyError(
            f'The regular expression "{text}" is malformed: {problem}. Supported are characters, ".", "\\d", "\\w", "\\s", '
            'classes such as "[a-c]", groups, "|", and "*", "+", "?", "{2,3}".'
        ) from None


def _translate(text: str) -> regular.Node:
    if len(text) > _LONGEST:
        raise _malformed(text[:40] + "...", f"it has {len(text)} characters, and may have {_LONGEST}")
    parts: list[regular.Node] = []
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character == "*":
            parts.append(regular.Repeat(regular.ANY))
        elif character == "?":
            parts.append(regular.ANY)
        elif character == "]":
            raise _malformed(text, f'the "]" at character {position} closes no "["')
        elif character == "[":
            end = text.find("]", position + 1)  # a "]" right after the "[" stands for itself, as in the shell
            if end < 0:
                raise _malformed(text, f'the "[" at character {position} is never closed')
            parts.append(_bracket(text, text[position:end]))
            position = end + 1
        else:
            parts.append(regular.Char(character))
    return regular.Sequence(tuple(parts))


def _bracket(text: str, body: str) -> regular.Node:
    if _NUMBERS.fullmatch(body) and not body.isdecimal():
        return regular.words(_numbers(text, body))
    negated = body.startswith("!")
    members = body[1:] if negated else body
    if not members or "[" in members:
        raise _malformed(text, f'"[{body}]" is not a class of characters')
    characters = re.sub(r"([\\\[\]^&~|])", r"\\\1", members)
    try:
        return regular.Char(re.compile(f"[{'^' if negated else ''}{characters}]"))
    except re.error as problem:
        raise _malformed(text, f'"[{body}]" is not a class of characters ({problem.msg})') from None


def _numbers(text: str, body: str) -> list[str]:
    numbers: list[int] = []
    for part in body.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise _malformed(text, f'the range "{part}" runs backwards')
        if high - low >= _MOST_NUMBERS:
            raise _malformed(text, f'the range "{part}" holds more than {_MOST_NUMBERS} numbers')
        numbers.extend(range(low, high + 1))
    return list(map(str, numbers))


def _malformed(text: str, what: str) -> PolicyError:
    return PolicyError(
        f'The module glob "{text}" is malformed: {what}. Supported are "*", "?", classes such as "[abc]" and numbers '
        f'such as "[0-31]" or "[0,4,8-11]", or a regular expression after "{REGEX}".'
    )
