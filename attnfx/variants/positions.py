"""Where a query stands among the keys, for variants whose pattern follows the position."""

from __future__ import annotations

from attnfx import expr
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import standing


def objections(site: AttentionSite, pattern: str) -> tuple[str, ...]:
    """Why the positions of the queries are not known; ``pattern`` is what needs them, with an article: "a window"."""
    diagonals = site.facts.delta_low
    if len(diagonals) > 1:
        return (f"The mask has {len(diagonals)} causal diagonals, and {pattern} needs one to follow.",)
    if diagonals or site.queries == site.keys:
        return ()
    if site.queries != 1:
        return (
            f"The {site.queries} queries and {site.keys} keys have no common positions (no causal mask is proved), "
            f"as in cross-attention; {pattern} needs as many queries as keys, or a causal mask.",
        )
    if site.facts.rest and standing.last_key(site) is None:
        return (
            f"The mask of the single query is data, so its position among the keys cannot be proved; {pattern} needs "
            "a causal mask, or no mask.",
        )
    return ()


def position(site: AttentionSite) -> Expr:
    """The key at which query i stands: the last one that a causal mask lets it see, that of a single query also where the mask is
    data, or i + N - M where there is no such mask (the last query at the last key). Only where there are no :func:`objections`."""
    i, diagonals = expr.index("i"), site.facts.delta_low
    if (last := standing.last_key(site)) is not None:
        return last
    return i - expr.integer(diagonals[0]) if diagonals else i + site.key_length - site.query_length


def window(site: AttentionSite, width: int, sinks: int = 0) -> Expr:
    """Keys nearer to the query than ``width``, on either side of it, or among the first ``sinks``. What a causal mask hides
    anyway is not said again. Only where there are no :func:`objections`."""
    j = expr.index("j")
    distance, most = position(site) - j, expr.integer(width - 1)
    near = [expr.le(distance, most)]
    if not site.facts.delta_low:
        near.append(expr.le(-distance, most))
    sink = expr.le(j, expr.integer(sinks - 1))
    return expr.logical_and(*(expr.logical_or(side, sink) for side in near))


def ordered(site: AttentionSite) -> bool:
    """Whether no query sees a key behind its own place: under a causal mask, and a single query, which stands at the last key."""
    return site.facts.causal or bool(site.queries == 1)
