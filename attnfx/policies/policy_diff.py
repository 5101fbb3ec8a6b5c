"""What two policies say differently, rule by rule."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from attnfx.policies.rule import Rule
from attnfx.policy import Policy


@dataclass(frozen=True)
class Change:
    """A rule that only the first ("-") or only the second ("+") policy has at this place of its order: "rule 3" or "default"."""

    sign: str
    place: str
    rule: Rule

    def to_dict(self) -> dict[str, Any]:
        """The change as plain data."""
        return {"change": "removed" if self.sign == "-" else "added", "place": self.place, "rule": self.rule.to_dict()}


def changes(before: Policy, after: Policy) -> list[Change]:
    """The fewest rules to remove and to add; a rule that moved is removed and added, as order decides."""
    found: list[Change] = []
    for kind, a, b, c, d in SequenceMatcher(None, before.rules, after.rules, autojunk=False).get_opcodes():
        if kind != "equal":
            found += [Change("-", f"rule {n + 1}", before.rules[n]) for n in range(a, b)]
            found += [Change("+", f"rule {n + 1}", after.rules[n]) for n in range(c, d)]
    if before.default != after.default:
        found += [Change("-", "default", before.default)] if before.default else []
        found += [Change("+", "default", after.default)] if after.default else []
    return found
