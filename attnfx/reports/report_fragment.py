"""What a notebook shows of a report or of one attention: a fragment whose styles stay inside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnfx.report import Report, SiteReport


def report_fragment(report: Report) -> str:
    """The report's table: a row for equal attentions, the near misses and the warnings."""
    from attnfx.reports.report_html import environment
    from attnfx.reports.report_text import groups, summary

    rows = [(group.modules, group.sites[0]) for group in groups(report)]
    return environment().get_template("report_fragment.html").render(report=report, summary=summary(report), rows=rows)


def site_fragment(site: SiteReport) -> str:
    """One attention: formula, mask, decision, what was not chosen, and its kernel."""
    from attnfx.reports.report_group import describe
    from attnfx.reports.report_html import environment
    from attnfx.reports.report_kernels import Listing
    from attnfx.reports.report_text import TOP, Group

    kernels, where = Listing().of(site)
    about = describe(Group(site.module or TOP, (site,)))
    return environment().get_template("site_fragment.html").render(
        site=site, name=site.module or TOP, about=about, kernels=kernels, where=where
    )  # fmt: skip
