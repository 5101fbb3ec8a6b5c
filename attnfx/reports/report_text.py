"""A report as text: a table of at most 100 columns in which equal layers share an entry."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from attnfx.graphs.module_paths import fold

if TYPE_CHECKING:
    from attnfx.graphs.breaks import Break
    from attnfx.report import Compile, Missed, Report, SiteReport

WIDTH = 100
TOP = "(the model itself)"
"""How tables name an attention that is in no submodule."""


def table(report: "Report") -> str:
    """The table, after one line that sums it up, and before the near misses and the policy's warnings."""
    blocks = [wrapped(summary(report), "")]
    if report.sites:
        blocks.append(_sites(report))
    if report.missed:
        blocks.append("\n".join(["Left as they were:", *_near_misses(report.missed)]))
    if report.breaks:
        blocks.append("\n".join(["Dynamo ended a graph here, and what runs here is not seen:", *_breaks(report.breaks)]))
    if report.compiles:
        blocks.append("\n".join(["Compiled:", *(line for compiling in report.compiles for line in _compile(compiling))]))
    if report.policy_warnings:
        blocks.append("\n".join(["Policy:", *(wrapped(warning, "  ") for warning in report.policy_warnings)]))
    return "\n\n".join(blocks)


def summary(report: "Report") -> str:
    """The report in a sentence: how many attentions, what runs them, how many are approximate, how many were missed."""
    if not report.sites:
        what = "attnfx: no attention found; the model compiles as it would without attnfx"
    else:
        ways = ", ".join(f"{decision} {count}" for decision, count in Counter(s.decision for s in report.sites).items())
        approximate = sum(not site.exact for site in report.sites)
        exactness = f"{approximate} approximate, by policy" if approximate else "all exact"
        what = f"attnfx: {count(len(report.sites), 'attention')} ({ways}), {exactness}"
    return f"{what}; {count(len(report.missed), 'near miss', 'es')}." if report.missed else f"{what}."


@dataclass(frozen=True)
class Group:
    """Attentions that differ in nothing but the number of their layer, under one name."""

    modules: str
    sites: tuple["SiteReport", ...]


def groups(report: "Report") -> list[Group]:
    """The report's sites, equal ones together, in the order of their first appearance."""
    alike: dict[tuple[object, ...], list[SiteReport]] = {}
    for site in report.sites:
        told = site.biases if site.variant is not None else ()  # how good an approximation is, of each layer
        key = (site.pattern, str(site.site), site.decision, site.variant, site.reason, site.exactness, told)
        alike.setdefault(key, []).append(site)
    found = []
    for sites in alike.values():
        for name, modules in fold(dict.fromkeys(site.module for site in sites)):
            members = tuple(site for site in sites if site.module in modules)
            found.append(Group(f"{name or TOP} ×{len(members)}" if len(members) > 1 else name or TOP, members))
    return found


def _sites(report: "Report") -> str:
    found = groups(report)
    decision = max(len("runs as"), *(len(group.sites[0].decision) for group in found))
    exactness = min(max(len("exactness"), *(len(group.sites[0].exactness) for group in found)), WIDTH // 2)
    first = min(max(len(group.modules) for group in found), WIDTH - decision - exactness - 4)
    lines = [f"{'attention':{first}}  {'runs as':{decision}}  exactness".rstrip()]
    lines.append("─" * (first + decision + exactness + 4))
    for group in found:
        site = group.sites[0]
        names, gives_up = textwrap.wrap(group.modules, first), textwrap.wrap(site.exactness, exactness)
        rows = zip_longest(names, [site.decision], gives_up, fillvalue="")
        lines.extend(f"{name:{first}}  {runs:{decision}}  {given}".rstrip() for name, runs, given in rows)
        lines.append(wrapped(str(site.site), "  "))
        lines.append(wrapped(site.reason, "  "))
        lines.extend(wrapped(bias, "  ") for bias in site.biases)
        if read := buffers_of(group):
            lines.append(wrapped(read, "  "))
        if measured := [s.measured for s in group.sites if s.measured is not None]:
            lines.append(wrapped(f"verified: {max(measured, key=lambda m: (m.beyond, m.error))}", "  "))
    return "\n".join(lines)


def buffers_of(group: Group) -> str:
    """Which buffers of the model a group's formula was read from, as a sentence; empty for none."""
    names = [name for name, _ in fold(dict.fromkeys(name for site in group.sites for name in site.buffers))]
    return f"Read under a guard, compiled anew when changed: {', '.join(names)}." if names else ""


def _near_misses(missed: Iterable["Missed"]) -> Iterator[str]:
    """Each reason once, for all the places that it holds for, and the lines of code that they are in.

    Reasons that differ in the numbers of nodes only, as those of repeated layers do, are one reason.
    """
    alike: dict[str, list[Missed]] = {}
    for miss in missed:
        alike.setdefault(re.sub(r"(?<=[A-Za-z])_\d+\b", "", miss.reason), []).append(miss)
    for misses in alike.values():
        for where in _named([miss.module for miss in misses]):
            yield wrapped(f"{where}: {misses[0].reason}", "  ")
        for source in dict.fromkeys(miss.source for miss in misses if miss.source):
            yield _at(source)


def _breaks(breaks: Iterable["Break"]) -> Iterator[str]:
    for broken in breaks:
        yield wrapped(broken.reason, "  ")
        if broken.source:
            yield _at(broken.source)


def _compile(compiling: "Compile") -> Iterator[str]:
    found = count(compiling.attentions, "attention")
    yield wrapped(f"[{compiling.graph}] {compiling.at[11:19]} {found}, {compiling.seconds:.2f} s in attnfx", "  ")
    if compiling.function:
        yield _at(compiling.function)
    if compiling.reason:
        yield wrapped(f"compiled anew because of {compiling.reason}", "    ")


def _at(source: str) -> str:
    return "    at " + (source if len(source) <= WIDTH - 7 else source[: WIDTH - 11] + " ...")


def _named(modules: list[str]) -> list[str]:
    return [
        f"{name or TOP} ×{count}" if (count := sum(map(modules.count, members))) > 1 else name or TOP
        for name, members in fold(dict.fromkeys(modules))
    ]


def wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
