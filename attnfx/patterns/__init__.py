"""Recognition: every attention in a mirror, described; every look-alike, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import fx

from attnfx.graphs.mirror import Mirror
from attnfx.patterns import (  # noqa: F401 - the rules register themselves
    flex,
    joined,
    late_division,
    lift_bits,
    lift_choices,
    lift_elementary,
    lift_gathers,
    lift_moves,
    lift_places,
    lift_reductions,
    lift_sequences,
    lift_values,
    lift_windows,
    lift_writes,
    linear,
    sdpa,
    softmax,
    unnormalised,
)
from attnfx.patterns.candidate import Candidate, Refused
from attnfx.patterns.learned import Reading
from attnfx.patterns.lift import Stale
from attnfx.patterns.linear_site import LinearMatch
from attnfx.patterns.lookalikes import lookalikes
from attnfx.patterns.matcher import Match, match
from attnfx.patterns.near import NearMiss, closest, distinct

_FINDERS: tuple[Callable[[Mirror], Iterator[Candidate | tuple[fx.Node, str]]], ...] = (
    sdpa.find,
    softmax.find,
    joined.find,
    late_division.find,
    flex.find,
    unnormalised.find,
)


def recognise(mirror: Mirror) -> tuple[list[Match], list[NearMiss]]:
    """Every attention of ``mirror`` in graph order, and what was refused, once for each place."""
    found: list[Match] = []
    missed: list[NearMiss] = []
    others: dict[fx.Node, fx.Node] = {}
    for finder in _FINDERS:
        for item in finder(mirror):
            exponentials = item[0] if isinstance(item, tuple) else item.normaliser
            if finder is unnormalised.find and any(exponentials in m.candidate.consumed for m in found):
                continue  # divided further on
            if isinstance(item, tuple):
                missed.append(NearMiss(item[0], finder.__module__.rsplit(".", 1)[-1], item[1]))
                continue
            try:
                found.append(match(mirror, item))
            except (Refused, Stale) as refusal:
                missed.append(NearMiss(item.normaliser, item.pattern, str(refusal), read=True))
                others.setdefault(item.normaliser, item.output)
    told = {m.candidate.normaliser for m in found} | {m.node for m in missed} | {n for m in found for n in m.candidate.consumed}
    missed += [NearMiss(node, "lookalike", reason) for node, reason in lookalikes(mirror, told)]
    lost = {m.node for m in missed if not m.read}
    found = [_beside(m, others) for m in found if m.candidate.normaliser not in lost]
    found.sort(key=lambda m: mirror.position[m.candidate.output])
    found = distinct(found)
    return found, closest(mirror, found, missed)


def _beside(found: Match, others: Mapping[fx.Node, fx.Node]) -> Match:
    """The match, with a product that is no attention named among those that read its probabilities (relative values)."""
    other = others.get(found.candidate.normaliser)
    if other is None or found.candidate.also or other in found.candidate.consumed:
        return found
    return replace(found, candidate=replace(found.candidate, also=other.name))


def plainer(mirror: Mirror, found: Match) -> Iterator[Match]:
    """Other exact readings of ``found`` that take more of what is learned for data, the next best first."""
    readings: tuple[Reading, ...] = ("sum", "data") if found.band is None else ("formula", "sum", "data")
    for reading in readings:
        try:
            yield match(mirror, found.candidate, reading)
        except (Refused, Stale):
            continue


def recognise_linear(mirror: Mirror, found: list[Match], missed: list[NearMiss]) -> tuple[list[LinearMatch], list[NearMiss]]:
    """Every attention without a softmax over keys beside those ``found``, and ``missed`` without what is a part of one (the
    softmax of a feature map)."""
    taken = {n for m in found for n in (*m.candidate.consumed, m.candidate.normaliser)}
    linears = linear.find(mirror, taken)
    parts = {n for m in linears for n in m.through}
    return linears, [m for m in missed if m.node not in parts]
