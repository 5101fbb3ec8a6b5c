"""Which variant serves which attention: rules, of which the first that matches wins, and files that say the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnfx.errors import PolicyError
from attnfx.files import replace_file
from attnfx.policies.rule import KEEP, PHASES, Choice, Rule, Subject

__all__ = ["KEEP", "PHASES", "Policy", "Rule"]


@dataclass(frozen=True)
class Policy:
    """Rules in order of precedence, then `default`: a rule for every attention, or None. What no rule matches is rewritten exactly.

    `base | override` is a policy that tries the rules of `override` first.
    """

    rules: tuple[Rule, ...] = ()
    default: Rule | None = None

    def __init__(self, rules: Iterable[Rule] = (), default: Choice | Rule | str = None) -> None:
        """`default`: a variant, a list of variants, or "keep", as a rule has it."""
        rules = tuple(rules)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"A policy holds attnfx.Rule objects; one of these is {rule!r}.")
        if default is not None and not isinstance(default, Rule):
            default = Rule("*", default)  # type: ignore[arg-type]  # a rule checks what it is given
        if default is not None and default != Rule("*", default.variant):
            raise PolicyError(f'The default of a policy is for every attention; this one is for "{default.selection}".')
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "default", default)

    def __or__(self, override: Policy) -> Policy:
        """The rules of `override`, then these; the default is that of `override` where it has one."""
        if not isinstance(override, Policy):
            return NotImplemented
        return Policy((*override.rules, *self.rules), override.default or self.default)

    def choose(self, subject: Subject | str, phase: str = "prefill", sizes: Mapping[str, Any] | None = None) -> Rule | None:
        """The first rule for an attention (or what is at a module path), in one of the :data:`PHASES`, of sizes by the names that
        conditions have for them; or None."""
        return next((rule for rule in self.rules if rule.serves(subject, phase, sizes or {})), self.default)

    def unmatched(self, subjects: Iterable[Subject | str]) -> list[Rule]:
        """The rules that match none of these attentions, or module paths: most likely misspelt. Rules of another phase do not
        count, nor rules for any module that keep what they might have matched."""
        found = [Subject(subject) if isinstance(subject, str) else subject for subject in subjects]
        return [rule for rule in self.rules if rule.expected(found) and not any(map(rule.matches, found))]

    def shadowed(self, subjects: Iterable[Subject]) -> list[tuple[int, tuple[int, ...]]]:
        """The rules that match some of these attentions and can serve none, as earlier rules take them all: their places in
        `rules`, and the places of those earlier rules. A rule for every attention counts only behind another such."""
        found, taken = list(subjects), []
        for place, rule in enumerate(self.rules):
            mine = [subject for subject in found if rule.takes(subject, surely=False)]
            before = [next((n for n in range(place) if self.rules[n].takes(s, surely=True)), None) for s in mine]
            earlier = tuple(sorted({n for n in before if n is not None}))
            if not mine or None in before or not rule.expected(found):
                continue
            if not rule.is_wish or all(self.rules[n].is_wish for n in earlier):
                taken.append((place, earlier))
        return taken

    @property
    def asks_for_kinds(self) -> bool:
        """Whether a rule has to know what kind of attention it sees."""
        return any(rule.kind is not None for rule in self.rules)

    @property
    def changes_results(self) -> bool:
        """Whether a rule asks for a variant."""
        rules = self.rules if self.default is None else (*self.rules, self.default)
        return any(variant is not None for rule in rules for variant in rule.choices)

    @staticmethod
    def preset(name: str) -> Policy:
        """One of :data:`attnfx.policies.presets.PRESETS`, such as "streaming"."""
        from attnfx.policies.presets import named

        return named(name).policy

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """The policy in a TOML, YAML or JSON file, by its suffix. PolicyError names the file, the line, the key, what was found and
        what is allowed. Nothing of the file is executed, and no other file is read."""
        from attnfx.policies.policy_file import read

        policy, problems = read(Path(path))
        if policy is None:
            further = f" ({len(problems) - 1} more: attnfx policy check {path})" if len(problems) > 1 else ""
            raise PolicyError(f"{problems[0]}{further}")
        return policy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as TOML, YAML or JSON, by the suffix of `path`; a file there is replaced in one step, and no reader sees
        half of it."""
        from attnfx.policies.marked import format_of

        replace_file(Path(path), self.dumps(format_of(Path(path))))

    def dumps(self, format: str = "toml") -> str:
        """The policy as the text of a file: "toml", "yaml" or "json"."""
        from attnfx.policies.policy_writing import WRITERS

        return WRITERS[format](self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The policy as a file holds it."""
        default = {} if self.default is None else {"default": self.default.to_dict()["variant"]}
        return default | {"rules": [rule.to_dict() for rule in self.rules]}

    @staticmethod
    def coerce(given: Any) -> Policy:
        """A policy from what callers pass: a Policy, rules in a list or tuple, the path of a policy file (which has a suffix), the
        name of a preset, or None."""
        if given is None:
            return Policy()
        if isinstance(given, Policy):
            return given
        if isinstance(given, Rule):
            return Policy([given])
        if isinstance(given, str | os.PathLike):
            path = Path(given)
            return Policy.load(path) if path.suffix or len(path.parts) != 1 else Policy.preset(str(path))
        if isinstance(given, Sequence):
            return Policy(given)
        raise PolicyError(
            f"policy is {given!r}; it must be an attnfx.Policy, a list of attnfx.Rule, the path of a file, the name of a preset, "
            "or None."
        )
