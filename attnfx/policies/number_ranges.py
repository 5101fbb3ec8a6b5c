"""Whole numbers as people write them in a policy: "0-3,8" and "24-"."""

import re
from dataclasses import dataclass, field
from typing import Any

from attnfx.errors import PolicyError

_PART = re.compile(r"(\d{1,6})(-(\d{1,6})?)?", re.ASCII)
_MOST_PARTS = 1_000


@dataclass(frozen=True)
class NumberRanges:
    """The numbers of `text`, which says `what` they are: "0-3,8", and where `endless`, "24-" for 24 and all above."""

    text: str
    what: str
    endless: bool = True
    parts: tuple[tuple[int, int | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: Any = self.text
        if not isinstance(given, str):
            raise self._malformed("they must be text or one number")
        pieces = given.replace(" ", "").split(",")
        if len(pieces) > _MOST_PARTS:
            raise self._malformed(f"there are {len(pieces)} parts, and may be {_MOST_PARTS}")
        object.__setattr__(self, "parts", tuple(map(self._part, pieces)))

    def __contains__(self, number: int) -> bool:
        return any(low <= number and (high is None or number <= high) for low, high in self.parts)

    def _part(self, piece: str) -> tuple[int, int | None]:
        found = _PART.fullmatch(piece)
        if not found:
            raise self._malformed(f'"{piece[:40]}" is neither a number nor a range')
        low, high = int(found[1]), int(found[3]) if found[3] else None if found[2] else int(found[1])
        if high is None and not self.endless:
            raise self._malformed(f'the range "{piece}" has no end')
        if high is not None and high < low:
            raise self._malformed(f'the range "{piece}" runs backwards')
        return low, high

    def _malformed(self, problem: str) -> PolicyError:
        shown = repr(self.text) if len(repr(self.text)) <= 80 else repr(self.text)[:77] + "..."
        example = '"3", "0-3,8" or "24-"' if self.endless else '"3" or "0-3,8"'
        return PolicyError(f"The {self.what} are {shown}: {problem}; write them as {example}.")
