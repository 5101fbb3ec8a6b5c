"""What kind of attention a site is, for the rules of policies."""

from __future__ import annotations

from attnfx.site import AttentionSite


def kinds(site: AttentionSite) -> frozenset[str]:
    """Which of :data:`attnfx.policies.rule.KINDS` a site is; "self" and "cross" as its origin says."""
    said = {
        "self": site.origin.relation == "self",
        "cross": site.origin.relation == "cross",
        "causal": site.facts.causal,
        "decode": site.queries == 1,
        "linear": not site.exponential,
    }
    return frozenset(name for name, holds in said.items() if holds)
