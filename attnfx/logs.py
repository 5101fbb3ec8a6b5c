"""What a compile tells about itself: messages of torch's logging, structured trace events for tlparse, warnings that come once.

torch knows a package by its name: ``TORCH_LOGS="attnfx"`` (decisions), ``"+attnfx"`` (formulas, near misses, graphs) and
``torch._logging.set_logs(modules={"attnfx": logging.DEBUG})`` need no registration, and hold before attnfx is imported.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.utils import warn_once_cache
from torch._logging._internal import trace_structured

from attnfx.errors import AttnfxWarning
from attnfx.reports import report_text

if TYPE_CHECKING:
    from attnfx.report import Report

log = logging.getLogger("attnfx")


def tell(report: Report, seconds: float) -> None:
    """Say what was found in a graph and what was decided, which took ``seconds``."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s Rewritten in %.2f s.", report_text.summary(report), seconds)
        for group in report_text.groups(report):
            site = group.sites[0]
            log.info("%s: %s, %s; %s", group.modules, site.decision, site.exactness, site.reason)
            log.debug("%s is %s", group.modules, site.site)
        for missed in report.missed:
            log.info("%s left as it was: %s (%s)", missed.module or report_text.TOP, missed.reason, missed.source or missed.node)
        for broken in report.breaks:
            log.info("Dynamo ended the graph: %s (%s)", broken.reason, broken.source)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("the graph before:\n%s", report.before)
        log.debug("the graph after:\n%s", report.after)
    _trace(report)


def warn(text: str, category: type[Warning] = AttnfxWarning, stacklevel: int = 2) -> None:
    """Warn of ``text`` once, until ``torch._dynamo.reset()``; it is in the log every time."""
    log.debug("warning: %s", text)
    if text in warn_once_cache:
        return
    warn_once_cache.add(text)
    warnings.warn(text, category, stacklevel=stacklevel + 1)


def _trace(report: Report) -> None:
    """The report and the graphs as artifacts of this compile in the folder of ``TORCH_TRACE``; tlparse shows them."""
    _artifact("attnfx_report", "string", lambda: str(report))
    _artifact("attnfx_report_data", "json", lambda: replace(report, before="", after="").to_json())
    _artifact("attnfx_graph_before", "string", lambda: report.before)
    _artifact("attnfx_graph_after", "string", lambda: report.after)
    if any(site.kernel for site in report.sites):
        _artifact("attnfx_kernels", "string", lambda: "\n\n".join(dict.fromkeys(s.kernel for s in report.sites if s.kernel)))


def _artifact(name: str, encoding: str, payload: Any) -> None:
    inside = torch._guards.CompileContext.current_trace_id() is not None
    metadata = {"name": name, "encoding": encoding}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=payload, expect_trace_id=inside)
