"""The Python interface: compile, explain, verify."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from attnfx import backend, counting, measure
from attnfx.graphs import live
from attnfx.graphs.breaks import with_hidden
from attnfx.options import Options
from attnfx.report import Report


def compile(model: Any, policy: Any = None, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any) -> Any:
    """``torch.compile(model, backend="attnfx")`` with the options as named arguments (see :class:`attnfx.options.Options`).

    What it returns has an attribute ``attnfx_report``: the report of what ran so far, None before the first call.

    Raises UnknownOption or PolicyError at once, not at the first call.
    """
    given = {**options, "policy": policy} if policy is not None else options
    parsed = Options.parse(None, given)
    compiled = torch.compile(model, backend=backend.attnfx, dynamic=dynamic, fullgraph=fullgraph, options=given)
    return live.show(compiled if parsed.strict_sites is None else counting.checked(compiled, parsed.strict_sites, given))


def explain(model: Any, *args: Any, policy: Any = None, dynamic: bool | None = None, **kwargs: Any) -> Report:
    """What attnfx finds in ``model(*args, **kwargs)`` and decides under ``policy``, and why.

    Runs the model once, eagerly and without gradients unless they are enabled around the call; nothing is compiled for speed.

    Of a model that attnfx compiled and that has run, ``explain(compiled)`` is the report of what really ran, every graph that was
    compiled anew included, with when and why (``report.compiles``); with inputs, the compiled model is called with them first.
    With a ``policy`` it says what would run under that policy instead. Raises AttnfxError for a compiled model that has not run.
    """
    if policy is None and dynamic is None:
        call = (lambda: model(*args, **kwargs)) if args or kwargs else None
        if (ran := live.report_of(model, call)) is not None:
            return ran
    model = live.original(model)
    return _report(model, args, kwargs, dynamic, Options.parse(None, {"policy": policy, "inner": "eager"}))


def _report(model: Any, args: Any, kwargs: Any, dynamic: bool | None, options: Options) -> Report:
    reports: list[Report] = []

    def look(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        _, report = backend.rewrite(gm, options, inputs)
        reports.append(report)
        return gm.forward

    with fresh():
        counted = counters["graph_break"].copy()
        seen: Any = torch.compile(model, backend=look, dynamic=dynamic)
        seen(*args, **kwargs)
        report = Report.merge(reports) if reports else Report(())
        return replace(report, breaks=with_hidden(report.breaks, counters["graph_break"] - counted))


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Dynamo's cache emptied on both sides, so that every graph is seen and none of ours stays behind."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


@dataclass(frozen=True)
class Verification:
    """A rewritten model against the original: relative L2 errors of each output, by its place, and the report of the sites, whose
    ``measured`` is the error of each on the operands that the model gives it."""

    outputs: Mapping[str, float]
    report: Report

    @property
    def sites(self) -> Mapping[str, measure.Measured]:
        """What each rewritten attention measured, by the site's name."""
        return {site.name: site.measured for site in self.report.sites if site.measured is not None}

    @property
    def worst(self) -> float:
        """The largest error of any output; 0.0 without floating-point outputs."""
        return max(self.outputs.values(), default=0.0)

    def __str__(self) -> str:
        lines = [f"{name or 'output'}: relative L2 error {error:.3g}" for name, error in self.outputs.items()]
        return "\n".join([*lines, str(self.report)])


def verify(model: Any, *args: Any, policy: Any = None, **kwargs: Any) -> Verification:
    """The model with its attentions rewritten against its own, in numbers: each output end to end, and each site by itself.

    A site whose exact rewrite differs beyond the bound (:data:`attnfx.measure.TOLERANCE` times the epsilon of its dtype) is put
    back with an
    AttnfxWarning and listed in ``report.missed``. Runs the model four times, without gradients.
    """
    options = Options.parse(None, {"policy": policy, "inner": "eager", "verify": True})
    report = _report(model, args, kwargs, None, options)
    with torch.no_grad(), fresh():
        expected = model(*args, **kwargs)
        found = compile(model, policy, inner="eager")(*args, **kwargs)
    errors = {}
    for (path, a), b in zip(pytree.tree_leaves_with_path(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            errors[pytree.keystr(path)] = measure.difference(a, b)
    return Verification(errors, report)
