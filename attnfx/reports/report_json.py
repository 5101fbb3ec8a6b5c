"""A report as JSON's own kinds; docs/report.md describes every field, and a test keeps the two equal."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnfx.report import Report, SiteReport
    from attnfx.site import AttentionSite

#: The version of the format: raised when a field changes its meaning or goes. A field may be added without it.
SCHEMA = 1


def to_dict(report: Report) -> dict[str, Any]:
    """The whole report."""
    return {
        "schema": SCHEMA,
        "sites": [site.to_dict() for site in report.sites],
        "missed": [dataclasses.asdict(missed) for missed in report.missed],
        "policy_warnings": list(report.policy_warnings),
        "breaks": [dataclasses.asdict(broken) for broken in report.breaks],
        "compiles": [dataclasses.asdict(compile) for compile in report.compiles],
        "before": report.before,
        "after": report.after,
        "graphs": [plain(dataclasses.asdict(graph)) for graph in report.graphs],
    }


def site_to_dict(site: SiteReport) -> dict[str, Any]:
    """One attention: the fields of its report, with the formula beside the site's sizes, dtype and expressions."""
    flat = {field.name: getattr(site, field.name) for field in dataclasses.fields(site)}
    return flat | {
        "formula": str(site.site),
        "site": _attention(site.site),
        "original": None if site.original is None else _attention(site.original),
        "variant": site.variant.to_dict() if site.variant is not None else None,
        "measured": None if site.measured is None else plain(dataclasses.asdict(site.measured)),
        "considered": [plain(dataclasses.asdict(one)) for one in site.considered],
        "buffers": list(site.buffers),
        "biases": list(site.biases),
    }


def _attention(site: AttentionSite) -> dict[str, Any]:
    """The site's fields; what JSON cannot say (sizes that are symbols, -inf) as text."""
    names = (field.name for field in dataclasses.fields(site) if field.compare and not field.name.startswith("ranges"))
    return {name: plain(getattr(site, name)) for name in names}


def plain(value: Any) -> Any:
    """``value`` as JSON's own kinds."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return int(value) if getattr(value, "is_Integer", False) else str(value)
