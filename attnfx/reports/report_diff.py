"""What runs otherwise in another report: of the same model under another policy, on another device, after an edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from attnfx.graphs.module_paths import fold
from attnfx.reports.report_text import TOP, WIDTH, count, wrapped

if TYPE_CHECKING:
    from attnfx.report import Report, SiteReport

Changes = tuple[tuple[str, str, str], ...]
"""What is told of an attention, before, after."""


def diff(one: Report, other: Report) -> str:
    """The attentions that differ, equal layers together: decision, variant, exactness and formula, each before and after."""
    here, there = _by_place(one), _by_place(other)
    changed = {place: found for place in here if place in there and (found := _changes(here[place], there[place]))}
    only = (("in the first report only", here, there, other), ("in the second report only", there, here, one))
    lines = list(_changed(changed))
    gone = 0
    for title, sites, others, report in only:
        alone = {place: site for place, site in sites.items() if place not in others}
        gone += len(alone)
        lines += _alone(title, alone, report)
    same = sum(place in there for place in here) - len(changed)
    if not changed and not gone:
        return f"Nothing runs otherwise: {count(same, 'attention')} the same."
    numbers = f"{count(len(changed), 'attention')} changed, {gone} in one report only, {same} the same."
    return "\n".join([numbers, *lines])


def _by_place(report: Report) -> dict[tuple[str, str, int], SiteReport]:
    """The sites by module, name and number: a graph that was compiled anew has the same attention again."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for site in report.sites:
        found[site.module, site.name, seen[site.module, site.name]] = site
        seen[site.module, site.name] += 1
    return found


def _changes(one: SiteReport, other: SiteReport) -> Changes:
    told = [_told(site) for site in (one, other)]
    return tuple((key, told[0][key], told[1][key]) for key in told[0] if told[0][key] != told[1][key])


def _told(site: SiteReport) -> dict[str, str]:
    return {
        "runs as": site.decision,
        "variant": str(site.variant or "the model's own attention"),
        "result": site.exactness,
        "formula": str(site.site),
    }


def _changed(changed: dict[tuple[str, str, int], Changes]) -> Iterator[str]:
    for changes in dict.fromkeys(changed.values()):
        yield from _names(place[0] for place, found in changed.items() if found == changes)
        for key, before, after in changes:
            line = f"  {key}: {before} -> {after}"
            yield from [line] if len(line) <= WIDTH else [wrapped(f"{key}: {before}", "  "), wrapped(f"-> {after}", "    ")]


def _alone(title: str, alone: dict[tuple[str, str, int], SiteReport], other: Report) -> Iterator[str]:
    missed = {miss.module: miss.reason for miss in other.missed}
    entries = {place: (site.decision, missed.get(site.module, "")) for place, site in alone.items()}
    for decision, reason in dict.fromkeys(entries.values()):
        yield from _names(place[0] for place, found in entries.items() if found == (decision, reason))
        yield wrapped(f"{title}, as {decision}" + (f"; left as it was in the other: {reason}" if reason else ""), "  ")


def _names(modules: Iterable[str]) -> Iterator[str]:
    modules = list(modules)
    for name, members in fold(dict.fromkeys(modules)):
        number = sum(map(modules.count, members))
        yield f"{name or TOP} ×{number}" if number > 1 else name or TOP
