"""Recognition: every attention in a mirror, described; every look-alike, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from attnfx.capture import Mirror
from attnfx.patterns import lift_gathers, lift_moves, lift_values, linear, sdpa, softmax  # noqa: F401 - the rules register themselves
from attnfx.patterns.candidate import Candidate, Refused
from attnfx.patterns.lift import Stale
from attnfx.patterns.linear_site import LinearMatch
from attnfx.patterns.matcher import Match, match

_FINDERS: tuple[Callable[[Mirror], Iterator[Candidate | tuple[fx.Node, str]]], ...] = (sdpa.find, softmax.find)


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like attention and was refused."""

    node: fx.Node
    pattern: str
    reason: str


def recognise(mirror: Mirror) -> tuple[list[Match], list[NearMiss]]:
    """Every attention of ``mirror`` in graph order, and what was refused."""
    found: list[Match] = []
    missed: list[NearMiss] = []
    for finder in _FINDERS:
        for item in finder(mirror):
            if isinstance(item, tuple):
                missed.append(NearMiss(item[0], finder.__module__.rsplit(".", 1)[-1], item[1]))
                continue
            try:
                found.append(match(mirror, item))
            except (Refused, Stale) as refusal:
                missed.append(NearMiss(item.normaliser, item.pattern, str(refusal)))
    found.sort(key=lambda m: mirror.position[m.candidate.output])
    return found, missed


def recognise_linear(mirror: Mirror, found: list[Match], missed: list[NearMiss]) -> tuple[list[LinearMatch], list[NearMiss]]:
    """Every attention without a softmax over keys beside those ``found``, and ``missed`` without what is a part of one (the
    softmax of a feature map)."""
    taken = {n for m in found for n in (*m.candidate.consumed, m.candidate.normaliser)}
    linears = linear.find(mirror, taken)
    parts = {n for m in linears for n in m.through}
    return linears, [m for m in missed if m.node not in parts]
