"""Which variant serves which attention: rules over module paths, first match wins, kept as data in a TOML file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnfx.conditions import Condition
from attnfx.errors import PolicyError, listing, nearest
from attnfx.globs import Glob
from attnfx.policy_file import KEEP, read_rules, write_rules
from attnfx.variants.base import Variant

PHASES = ("training", "prefill", "decode")
"""What a graph is compiled for: gradients are wanted; or not, with several queries, or one."""


@dataclass(frozen=True)
class Rule:
    """`variant` for every attention whose module path matches the glob `modules`; None (or "keep") leaves it exact.

    `*` matches any run of characters, dots included, `?` one character, `[abc]` one of them, and `[0-31]` or
    `[0,4,8-11]` a whole number in these ranges: "model.layers.[0-31].self_attn". `when` is a condition over sizes, such as
    "kv_len >= 8192" (:class:`attnfx.conditions.Condition`); of lengths that change it is a guard, so that a graph is compiled anew
    only where it is crossed. `phase` is one of the :data:`PHASES`.
    """

    modules: str
    variant: Variant | None = None
    when: str | None = None
    phase: str | None = None
    glob: Glob = field(init=False, repr=False, compare=False)
    condition: Condition | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: Any = self.variant
        if given == KEEP:
            object.__setattr__(self, "variant", None)
        elif given is not None and not isinstance(given, Variant):
            raise PolicyError(
                f'The variant of the rule for "{self.modules}" is {given!r}; it must be an instance of a class of '
                f'attnfx.variants, or None or "{KEEP}" to leave the attention exact.'
            )
        object.__setattr__(self, "glob", Glob(self.modules))
        object.__setattr__(self, "condition", None if self.when is None else Condition(self.when))
        if self.phase is not None and self.phase not in PHASES:
            raise PolicyError(f"The phase is {self.phase!r}; known are {listing(PHASES)}.{nearest(str(self.phase), PHASES)}")

    def matches(self, module: str) -> bool:
        """Whether the rule speaks about the attention at this module path."""
        return self.glob.matches(module)

    def serves(self, module: str, phase: str, sizes: Mapping[str, Any]) -> bool:
        """Whether it is the rule for an attention at this path, in this phase, of these sizes."""
        if not self.matches(module) or self.phase not in (None, phase):
            return False
        return self.condition is None or self.condition.holds(sizes)

    def __str__(self) -> str:
        limits = "".join(f" {name} {given}" for name, given in (("when", self.when), ("in", self.phase)) if given is not None)
        return f'"{self.modules}"{limits} -> {self.variant or KEEP}'


@dataclass(frozen=True)
class Policy:
    """Rules in order of precedence. An attention that no rule matches is rewritten exactly."""

    rules: tuple[Rule, ...] = ()

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        rules = tuple(rules)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"A policy holds attnfx.Rule objects; one of these is {rule!r}.")
        object.__setattr__(self, "rules", rules)

    def choose(self, module: str, phase: str = "prefill", sizes: Mapping[str, Any] | None = None) -> Rule | None:
        """The first rule for the attention at a module path, in one of the :data:`PHASES`, of sizes by the names that conditions
        have for them; or None."""
        return next((rule for rule in self.rules if rule.serves(module, phase, sizes or {})), None)

    def unmatched(self, modules: Iterable[str]) -> list[Rule]:
        """The rules that match none of `modules`: most likely misspelt."""
        modules = list(modules)
        return [rule for rule in self.rules if not any(rule.matches(module) for module in modules)]

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Policy":
        """The policy in a TOML file. PolicyError names the file, the key, what was found and what is allowed."""
        return Policy(Rule(**rule) for rule in read_rules(Path(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as TOML; a file at `path` is replaced in one step, and no reader sees half of it."""
        names = ("modules", "variant", "when", "phase")
        write_rules(Path(path), [{name: getattr(rule, name) for name in names} for rule in self.rules])

    @staticmethod
    def coerce(given: Any) -> "Policy":
        """A policy from what callers pass: a Policy, rules in a list or tuple, the path of a policy file, or None."""
        if given is None:
            return Policy()
        if isinstance(given, Policy):
            return given
        if isinstance(given, Rule):
            return Policy([given])
        if isinstance(given, str | os.PathLike):
            return Policy.load(given)
        if isinstance(given, Sequence):
            return Policy(given)
        raise PolicyError(f"policy is {given!r}; it must be an attnfx.Policy, a list of attnfx.Rule, the path of a file, or None.")
