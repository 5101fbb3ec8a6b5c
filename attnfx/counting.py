"""The option ``strict_sites``: a model whose attentions are not all rewritten is an error, and the error says what is missing.

The number is that of the whole model: all the graphs that one ``torch.compile`` makes in its first call are counted together. More
than demanded is an error at once, and so is fewer where the first graph is the whole of the function. Where graph breaks divide it, how
many there are is known at the end of the first call: ``attnfx.compile`` looks then; ``torch.compile``, which tells a backend nothing of
ends, when the second call begins. Graphs that are compiled later, for other sizes, are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch._guards import CompileContext

from attnfx.errors import SiteCountError
from attnfx.report import Report
from attnfx.report_text import TOP

_BROKEN = " The model has graph breaks; these are the attentions of all its graphs."


@dataclass
class Tally:
    """What the graphs of one compile gave so far. ``frame``: the function that was compiled first; ``closed``: its first call is over."""

    expected: int
    options: Any
    frame: object = None
    reports: list[Report] = field(default_factory=list)
    closed: bool = False

    def add(self, report: Report, frame: object, whole: bool) -> None:
        """Count a graph. Raises SiteCountError where the number cannot be right any more."""
        if self.reports and frame is not None and frame == self.frame:
            self.close()
        if self.closed:
            return
        if not self.reports:
            self.frame = frame
        self.reports.append(report)
        if self.found > self.expected or (whole and len(self.reports) == 1 and self.found != self.expected):
            self.closed = True
            raise self.error()
        self.closed = whole and len(self.reports) == 1

    def close(self) -> None:
        """The first call is over. Raises SiteCountError where too few were rewritten."""
        if not self.closed and self.reports:
            self.closed = True
            if self.found != self.expected:
                raise self.error()

    def watched(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, a graph just counted; if it is the first of several, its second call ends the count."""
        if self.closed or len(self.reports) != 1:
            return compiled
        calls = 0

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                self.close()
            return compiled(*args)

        return call

    @property
    def found(self) -> int:
        return sum(site.rewritten for report in self.reports for site in report.sites)

    def error(self) -> SiteCountError:
        sites = [f"{s.module or TOP}: {s.site} ({s.source})" for report in self.reports for s in report.sites if s.rewritten]
        missed = [f"{m.module or TOP}: {m.reason} ({m.source or m.node})" for report in self.reports for m in report.missed]
        return SiteCountError(self.expected, sites, missed, _BROKEN if len(self.reports) > 1 else "")


#: One tally for each mapping of options that was given to torch.compile; it holds the mapping, so that its identity stays its own.
_TALLIES: dict[int, Tally] = {}


def count(expected: int, report: Report, gm: fx.GraphModule, options: Mapping[str, Any] | None) -> Tally:
    """Count the graph ``gm`` of the compile that was given ``options``. Raises SiteCountError."""
    tally = tally_of(options) or _TALLIES.setdefault(id(options), Tally(expected, options))
    compiling = CompileContext.current_compile_id()
    frame = None if compiling is None else compiling.frame_id
    why = getattr(gm, "compile_subgraph_reason", None)
    tally.add(report, frame, whole=why is None or not why.graph_break)
    return tally


def checked(compiled: Any, options: Mapping[str, Any]) -> Any:
    """``compiled``, made by torch.compile with ``options``: its first call that returns ends the count."""

    def close() -> None:
        if (tally := tally_of(options)) is not None:
            tally.close()

    if isinstance(compiled, nn.Module):
        handle = compiled.register_forward_hook(lambda *_: (handle.remove(), close())[1])
        return compiled

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = compiled(*args, **kwargs)
        close()
        return result

    return call


def tally_of(options: Mapping[str, Any] | None) -> Tally | None:
    """The tally of the compile that was given ``options``; None before its first graph."""
    return _TALLIES.get(id(options))
