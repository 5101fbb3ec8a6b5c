"""An attention without a softmax over keys as the splicer takes it: queries and keys behind their feature maps."""

from __future__ import annotations

from typing import Any

from attnfx.patterns.candidate import Candidate
from attnfx.patterns.linear_site import LinearMatch
from attnfx.patterns.matcher import Match
from attnfx.patterns.versions import Past


def as_match(found: LinearMatch) -> Match:
    """``found`` with the operands of its product; what maps them stays in the graph."""

    def unread(*args: Any) -> Any:
        raise LookupError("an attention without a softmax over keys has no logits")

    keys = found.site.keys
    candidate = Candidate("linear", found.output, found.output, -1, keys, keys, unread, unread, unread, "zero")
    query, key = found.mapped
    loads = tuple(Past(node, node) for node in found.loads)
    return Match(found.site, candidate, found.layout, found.extents, query, key, found.value, found.result, loads)
