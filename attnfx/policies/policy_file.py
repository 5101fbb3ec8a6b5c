"""Policies from files: every problem with its file, line and key, what was found, what is allowed, and the nearest spelling."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from attnfx import variants
from attnfx.errors import PolicyError, listing, nearest
from attnfx.policies import marked
from attnfx.policies.marked import Marked, Place, Unreadable
from attnfx.policies.rule import KEEP, SELECTORS, Choice, Rule, choice
from attnfx.policy import Policy
from attnfx.variants.base import Variant

_KEYS = (*SELECTORS, "variant")
_TOP = ("rules", "default", "$schema")
_LONGEST = 600
_T = TypeVar("_T")
_PARAMETER = re.compile(r"\w+\.(\w+) (?:is|has|holds|names) ")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a policy file; `line` and `rule` count from 1, and are 0 where there is none."""

    file: str
    line: int
    rule: int
    key: str
    message: str

    def __str__(self) -> str:
        line, rule = f", line {self.line}" if self.line else "", f", rule {self.rule}" if self.rule else ""
        key = f", {self.key}" if self.key and f'"{self.key}"' not in self.message else ""
        return f"{self.file}{line}{rule}{key}: {self.message}"


def read(path: Path) -> tuple[Policy | None, list[Problem]]:
    """The policy in a file, or None and what is wrong with it. Raises PolicyError where the file cannot be read at all."""
    return _read(str(path), lambda: marked.read(path))


def problems_of(content: bytes, file: str) -> list[Problem]:
    """What is wrong with the content of a file."""
    return _read(file, lambda: marked.parse(content, marked.format_of(Path(file))))[1]


def _read(file: str, load: Callable[[], Marked]) -> tuple[Policy | None, list[Problem]]:
    try:
        found = load()
    except Unreadable as problem:
        return None, [Problem(file, problem.line, 0, "", f"The policy cannot be read: {problem.what}.")]
    reader = _Reader(file, found)
    policy = reader.policy()
    return (None if reader.problems else policy), sorted(reader.problems, key=lambda problem: problem.line)


class _Reader:
    """Reads what it can, and notes every problem."""

    def __init__(self, file: str, found: Marked) -> None:
        self.file, self.marked, self.problems = file, found, list[Problem]()

    def note(self, place: Place, message: str) -> None:
        """A problem with the value at a place."""
        rule = int(place[1]) + 1 if len(place) > 1 and place[0] == "rules" else 0
        key = ".".join(str(part)[:60] for part in (place[2:] if rule else place))
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        self.problems.append(Problem(self.file, self.marked.line(place), rule, key, message))

    def attempt(self, place: Place, make: Callable[[], _T]) -> _T | None:
        """What `make` gives, or None and a note of what it complains of."""
        try:
            return make()
        except PolicyError as problem:
            found = _PARAMETER.match(str(problem))
            named = (*place, found[1]) if found else place
            self.note(named if named in self.marked.lines else place, str(problem))
            return None

    def known(self, table: Mapping[str, Any], place: Place, allowed: Iterable[str]) -> None:
        """Note the keys of a table that are not allowed."""
        allowed = tuple(allowed)
        for key in table:
            if key not in allowed:
                text = f'the key "{key[:60]}" is unknown; allowed are {listing(allowed)}.{nearest(key[:60], allowed)}'
                self.note((*place, key), text)

    def policy(self) -> Policy | None:
        data = self.marked.data
        if not isinstance(data, dict):
            self.note((), f'the file holds {_shown(data)}; it must hold a table with the key "rules".')
            return None
        self.known(data, (), _TOP)
        rules = data.get("rules", [])
        if not isinstance(rules, list):
            self.note(("rules",), f'"rules" is {_shown(rules)}; it must be tables, each under its own [[rules]].')
            return None
        found = [self.rule(rule, ("rules", number)) for number, rule in enumerate(rules)]
        default = Rule("*", self.choice(data["default"], ("default",))) if "default" in data else None
        return Policy([rule for rule in found if rule is not None], default)

    def rule(self, table: Any, place: Place) -> Rule | None:
        if not isinstance(table, dict):
            self.note(place, f'"rules" holds {_shown(table)}; it must hold tables, each under its own [[rules]].')
            return None
        before = len(self.problems)
        self.known(table, place, _KEYS)
        misspelt = len(self.problems) > before
        if not misspelt and not any(name in table for name in SELECTORS):
            asked = 'for every attention write modules = "*", or the policy\'s "default"'
            self.note(place, f'the key "modules" is missing, and so is any other that selects; {asked}.')
        if not misspelt and "variant" not in table:
            self.note(place, f'the key "variant" is missing; a rule says what runs: a variant, or "{KEEP}".')
        given: dict[str, Any] = {}
        for name in SELECTORS:
            if name in table and name != "heads":
                given[name] = self.selector(name, table[name], (*place, name))
        chosen = self.choice(table["variant"], (*place, "variant")) if "variant" in table else None
        if len(self.problems) > before:
            return None
        heads = {"heads": table["heads"]} if "heads" in table else {}
        return self.attempt((*place, "heads"), lambda: Rule(**given, variant=chosen, **heads))

    def selector(self, name: str, value: Any, place: Place) -> Any:
        """A selector alone, as a rule of its own would take it."""
        if value is None:
            self.note(place, f'"{name}" is nothing; leave the key out, or give it a value.')
            return None
        rule = self.attempt(place, lambda: Rule(**{name: value}))
        return None if rule is None else getattr(rule, name)

    def choice(self, value: Any, place: Place) -> Choice:
        """What "variant" or "default" says; None where it is "keep", or wrong."""
        if not isinstance(value, list):
            return self.variant(value, place)
        before = len(self.problems)
        found = [self.variant(item, (*place, number)) for number, item in enumerate(value)]
        if len(self.problems) > before:
            return None
        return self.attempt(place, lambda: choice(found, "the rule"))

    def variant(self, value: Any, place: Place) -> Variant | None:
        if value == KEEP:
            return None
        data = {"name": value} if isinstance(value, str) else value
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            form = 'a table such as { name = "SlidingWindow", window = 1024 }'
            self.note(place, f'"variant" is {_shown(value)}; it must be "{KEEP}" or {form}, or a list of these.')
            return None
        name = data["name"]
        if isinstance(value, str) and nearest(name, (KEEP,)):
            self.note(place, f'"variant" is {_shown(name)}; it must be "{KEEP}" or name a variant.{nearest(name, (KEEP,))}')
            return None
        kind = self.attempt((*place, "name"), lambda: variants.named(name[:60]))
        if kind is None:
            return None
        parameters = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # every subclass is a dataclass
        unknown = [key for key in data if key not in ("name", *parameters)]
        where = (*place, unknown[0]) if unknown else place
        return self.attempt(where, lambda: _made(kind, data))


def _made(kind: type[Variant], data: Mapping[str, Any]) -> Variant:
    try:
        return kind.from_dict(data)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as problem:
        if isinstance(problem, PolicyError):
            raise
        given = {name: value for name, value in data.items() if name != "name"}
        raise PolicyError(f"{kind.__name__} cannot have the parameters {_shown(given)}: {problem}.") from None


def _shown(value: Any) -> str:
    """A value as messages print it: its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__} of {len(text)} characters)"
