"""A report as one HTML page that needs no other file and no network: templates filled here, styles and scripts inlined."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from attnfx.errors import listing as listed
from attnfx.reports.graph_code import listing
from attnfx.reports.graph_data import data, short
from attnfx.reports.module_tree import tree
from attnfx.reports.report_group import describe
from attnfx.reports.report_kernels import Listing
from attnfx.reports.report_text import TOP, groups, summary

if TYPE_CHECKING:
    import jinja2

    from attnfx.report import Report, SiteReport

_SCRIPTS = ("page.js", "layout.js", "graph.js", "code.js")


def page(report: Report, targets: Sequence[str] = (), sample: int = 4096) -> str:
    """The page. ``targets``: for which GPUs the kernels are compiled, to say what they take."""
    kernels = Listing(targets, sample)
    numbers = {id(site): n for n, site in enumerate(report.sites)}
    cards: list[dict[str, Any]] = []
    leaves: list[tuple[int, SiteReport, str]] = []
    for group in groups(report):
        shown, where = kernels.of(group.sites[0])
        fresh = [kernel for kernel in shown if all(kernel is not one for card in cards for one in card["kernels"])]
        members = [(numbers[id(site)], site) for site in group.sites]
        cards.append({
            "group": group, "site": group.sites[0], "about": describe(group), "kernels": shown, "fresh": fresh, "where": where,
            "members": members, "source": _common(site.source for site in group.sites),
            "verified": any(site.measured is not None for site in group.sites),
        })  # fmt: skip
        leaves += [(number, site, "exact" if site.exact else "approximate") for number, site in members]
    placed: list[tuple[str, dict[str, object]]] = [
        (site.module, {"id": f"site-{n}", "site": site, "tone": tone, "way": _way(site)})
        for n, site, tone in sorted(leaves, key=lambda x: x[0])
    ]
    placed += [
        (miss.module, {"id": f"missed-{n}", "missed": miss, "tone": "missed", "way": "left as it was"})
        for n, miss in enumerate(report.missed)
    ]
    scripts = "\n".join(_file(name) for name in _SCRIPTS)
    return environment().get_template("page.html").render(
        report=report, summary=summary(report), cards=cards, tree=tree(placed), top=TOP,
        style=_file("style.css"), script=scripts, script_hash=_hash(scripts), style_hash=_hash(_file("style.css")),
        graph=data(report) if report.graphs else "", code=listing(short(report.before), short(report.after)),
        targets=listed(targets) if targets else "",
    )  # fmt: skip


@cache
def environment() -> jinja2.Environment:
    """The templates of the package; everything that is not marked as markup is escaped."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["short"] = short
    return made


def _common(sources: Iterable[str]) -> str:
    """The source line that attentions share, or nothing."""
    first, *others = dict.fromkeys(sources)
    return "" if others else short(first)


def _way(site: SiteReport) -> str:
    """A decision in a word or two, for the tree."""
    return site.decision if site.variant is None else f"{site.decision}, {type(site.variant).__name__}"


def _file(name: str) -> str:
    return (resources.files("attnfx.reports") / "report_page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
