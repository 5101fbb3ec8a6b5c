"""Globs over module paths: as in the shell, and brackets may also hold ranges of whole numbers."""

import re
from dataclasses import dataclass, field

from attnfx.errors import PolicyError

_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_MOST_NUMBERS = 10_000


@dataclass(frozen=True)
class Glob:
    """A pattern such as "model.layers.[0-31].*"; PolicyError says what is malformed and where.

    `*` is any run of characters, dots included; `?` one character; `[0-31]` and `[0,4,8-11]` a whole number in these
    ranges; any other bracket, `[abc]`, `[!a-c]` or `[12]`, one character of the class. The whole path has to match.
    """

    text: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise PolicyError(f'The module glob is {self.text!r}; it must be text such as "model.layers.[0-3].*" or "*".')
        object.__setattr__(self, "_regex", re.compile(_translate(self.text), re.DOTALL))

    def matches(self, module: str) -> bool:
        """Whether the whole module path fits the glob."""
        return self._regex.fullmatch(module) is not None


def _translate(text: str) -> str:
    regex, position = "", 0
    while position < len(text):
        character = text[position]
        position += 1
        if character == "*":
            regex += ".*"
        elif character == "?":
            regex += "."
        elif character == "]":
            raise _malformed(text, f'the "]" at character {position} closes no "["')
        elif character == "[":
            end = text.find("]", position + 1)  # a "]" right after the "[" stands for itself, as in the shell
            if end < 0:
                raise _malformed(text, f'the "[" at character {position} is never closed')
            regex += _bracket(text, text[position:end])
            position = end + 1
        else:
            regex += re.escape(character)
    return regex


def _bracket(text: str, body: str) -> str:
    if _NUMBERS.fullmatch(body) and not body.isdecimal():
        return _numbers(text, body)
    negated = body.startswith("!")
    members = body[1:] if negated else body
    if not members or "[" in members:
        raise _malformed(text, f'"[{body}]" is not a class of characters')
    characters = re.sub(r"([\\\[\]^&~|])", r"\\\1", members)
    try:
        re.compile(f"[{characters}]")
    except re.error as problem:
        raise _malformed(text, f'"[{body}]" is not a class of characters ({problem.msg})') from None
    return f"[{'^' if negated else ''}{characters}]"


def _numbers(text: str, body: str) -> str:
    numbers: list[int] = []
    for part in body.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise _malformed(text, f'the range "{part}" runs backwards')
        if high - low >= _MOST_NUMBERS:
            raise _malformed(text, f'the range "{part}" holds more than {_MOST_NUMBERS} numbers')
        numbers.extend(range(low, high + 1))
    return f"(?:{'|'.join(map(str, numbers))})"


def _malformed(text: str, what: str) -> PolicyError:
    return PolicyError(
        f'The module glob "{text}" is malformed: {what}. Supported are "*", "?", classes such as "[abc]" and numbers '
        'such as "[0-31]" or "[0,4,8-11]".'
    )
