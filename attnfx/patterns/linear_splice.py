"""An attention without a softmax over keys as the splicer takes it: queries and keys behind their feature maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnfx.patterns.candidate import Candidate
from attnfx.patterns.linear_site import LinearMatch
from attnfx.patterns.matcher import Match
from attnfx.patterns.versions import Past


def as_match(found: LinearMatch) -> Match:
    """``found`` with the operands of its product; what maps them stays in the graph."""

    def unread(*args: Any) -> Any:
        raise LookupError("an attention without a softmax over keys has no logits")

    keys, layout = found.site.keys, found.layout
    if set(layout.groups) & (found.mapped[1].symbols | found.value.symbols):  # repeated for the query heads before it is mapped
        layout = replace(layout, heads=(*layout.heads, *layout.groups), groups=())
    candidate = Candidate("linear", found.output, found.output, -1, keys, keys, unread, unread, unread, "zero")
    query, key = found.mapped
    loads = tuple(Past(node, node) for node in found.loads)
    return Match(found.site, candidate, layout, found.extents, query, key, found.value, found.result, loads)
