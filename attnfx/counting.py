"""The option ``strict_sites``: a model whose attentions are not all rewritten is an error, and the error says what is missing.

The number is that of the whole model: the attentions in all the graphs that its first call compiles, each graph once, however
many layers
run it. A function that is compiled whole is judged when it is compiled. One that graph breaks divide is judged at the end of
its first
call, which ``attnfx.compile`` sees; ``torch.compile`` tells a backend nothing of ends, so that there a warning says that
nothing was
judged. Graphs that are compiled later, for other sizes, are not counted.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from attnfx.errors import AttnfxWarning, SiteCountError
from attnfx.report import Report
from attnfx.reports.report_text import TOP

_BROKEN = " The model has graph breaks; these are the attentions of all its graphs."
_BETWEEN = ("/torch/nn/modules/module.py", "/torch/_utils_internal.py", "/contextlib.py")


@dataclass
class Tally:
    """What the graphs of one compile gave so far. ``ends``: somebody calls :meth:`close` when its first call is over."""

    expected: int
    options: Any
    ends: bool = False
    reports: list[Report] = field(default_factory=list)
    closed: bool = False

    def add(self, report: Report, whole: bool) -> None:
        """Count a graph. Raises SiteCountError where the number cannot be right any more."""
        if self.closed:
            return
        self.reports.append(report)
        whole = whole and len(self.reports) == 1
        if whole or (self.ends and self.found > self.expected):
            self.close()
        elif not self.ends:
            self.closed = True
            text = (
                "strict_sites is not judged: the model has graph breaks, and torch.compile does not say when its first call ends."
            )
            warnings.warn(
                f"{text} attnfx.compile(model, strict_sites={self.expected}) counts all its graphs.", AttnfxWarning, stacklevel=3
            )

    def close(self) -> None:
        """Nothing more is counted. Raises SiteCountError where the number is not what is demanded."""
        if not self.closed and self.reports:
            self.closed = True
            if self.found != self.expected:
                raise self.error()

    @property
    def found(self) -> int:
        """How many attentions were rewritten."""
        return sum(site.rewritten for report in self.reports for site in report.sites)

    def error(self) -> SiteCountError:
        """What was found and what was not, as an error."""
        sites = [f"{s.module or TOP}: {s.site} ({s.source})" for report in self.reports for s in report.sites if s.rewritten]
        missed = [f"{m.module or TOP}: {m.reason} ({m.source or m.node})" for report in self.reports for m in report.missed]
        return SiteCountError(self.expected, sites, missed, _BROKEN if len(self.reports) > 1 else "")


#: One tally for each mapping of options that was given to torch.compile; it holds the mapping, so that its identity stays its own.
_TALLIES: dict[int, Tally] = {}


def count(expected: int, report: Report, gm: fx.GraphModule, options: Mapping[str, Any] | None) -> None:
    """Count the graph ``gm`` of the compile that was given ``options``. Raises SiteCountError."""
    why = getattr(gm, "compile_subgraph_reason", None)
    whole = (why is None or not why.graph_break) and _outermost()
    _TALLIES.setdefault(id(options), Tally(expected, options)).add(report, whole)


def checked(compiled: Any, expected: int, options: Mapping[str, Any]) -> Any:
    """``compiled``, made by torch.compile with ``options``: the end of its first call ends the count."""
    tally = _TALLIES[id(options)] = Tally(expected, options, ends=True)
    if isinstance(compiled, nn.Module):

        def ended(*_: Any) -> None:
            handle.remove()
            tally.close()

        handle = compiled.register_forward_hook(ended)
        return compiled

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = compiled(*args, **kwargs)
        tally.close()
        return result

    return call


def _outermost() -> bool:
    """Whether Dynamo is compiling the function that was given to torch.compile, and not one that it calls."""
    frame: Any = sys._getframe()
    inside = False  # Dynamo's own frames, between the backend and the caller of what is compiled
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if name.endswith("/torch/_dynamo/convert_frame.py"):
            inside = True
        elif inside and name.endswith("/torch/_dynamo/eval_frame.py"):
            return True
        elif inside and "/torch/_dynamo/" not in name and not name.endswith(_BETWEEN):
            return False
        frame = frame.f_back
    return True
