"""Near misses: what looked like attention and was refused, at most once for each place, by the reading that came closest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from attnfx.graphs.mirror import Mirror
from attnfx.patterns.matcher import Match


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like attention and was refused.

    ``node``: its normaliser. ``read``: whether a pattern had all the parts of an attention together, so that the matcher
    refused it.
    """

    node: fx.Node
    pattern: str
    reason: str
    read: bool = False


def closest(mirror: Mirror, found: Iterable[Match], missed: Iterable[NearMiss]) -> list[NearMiss]:
    """One of ``missed`` for each node of the user's graph, in its order: one that a pattern could read rather than one that it
    could not, the earlier pattern's else. None for what is part of an attention that was ``found``."""
    served = {id(_place(mirror, n)) for m in found for n in (m.candidate.normaliser, m.candidate.output, *m.candidate.consumed)}
    best: dict[int, NearMiss] = {}
    for miss in missed:
        place = id(_place(mirror, miss.node))
        if place not in served and (place not in best or (miss.read and not best[place].read)):
            best[place] = miss
    return sorted(best.values(), key=lambda miss: mirror.position.get(miss.node, 0))


def distinct(found: Iterable[Match]) -> list[Match]:
    """The first of the matches for each result."""
    return list({id(m.candidate.output): m for m in reversed(list(found))}.values())[::-1]


def _place(mirror: Mirror, node: fx.Node) -> fx.Node:
    return mirror.origin.get(node, node)
