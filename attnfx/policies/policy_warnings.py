"""What a policy asked for and did not get, as sentences after a compile: rules that matched nothing, and rules that cannot fire."""

from __future__ import annotations

from collections.abc import Iterable

from attnfx.decide import subject
from attnfx.policy import Policy
from attnfx.report import Report


def policy_warnings(policy: Policy, report: Report) -> tuple[str, ...]:
    """A sentence for each rule of ``policy`` that serves no attention of a graph and looks as if it should."""
    subjects = [subject(site.site) for site in report.sites]
    names = _names(site.module for site in report.sites)
    said = []
    for rule in policy.unmatched(subjects):
        left = [missed for missed in report.missed if rule.matches(missed.module)]
        if left:
            modules, reason = _names(missed.module for missed in left), left[0].reason
            said.append(f"The policy's rule {rule} matches only what stays as the model computes it, {modules}: {reason}")
        else:
            said.append(f"The policy's rule {rule} matches no attention of this graph; it has: {names}.")
    for place, earlier in policy.shadowed(subjects):
        takers = " and ".join(f"rule {n + 1}, {policy.rules[n].selection}," for n in earlier)
        comes = f"{takers} comes" if len(earlier) == 1 else f"{takers} come"
        said.append(
            f"The policy's rule {place + 1}, {policy.rules[place]}, can serve no attention of this graph: {comes} before it and "
            f"match{'es' if len(earlier) == 1 else ''} all that it matches."
        )
    return tuple(said)


def _names(modules: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(module or "the model itself" for module in modules)) or "none"
