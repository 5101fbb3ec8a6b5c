"""What a compiled model really runs: the report of each graph that was compiled for it, when and why.

torch.compile gives every model an object that calls the backend. The reports are kept with that object, so they live as long as
the compiled model does, and two models of one class do not mix.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from attnfx.errors import AttnfxError
from attnfx.report import Compile, Report

_KEPT = "_attnfx_kept"
_DEPTH = 12
"""How many frames a backend may be away from the object that torch.compile made: other backends may stand in between."""


@dataclass
class Kept:
    """The reports of the graphs that were compiled for one model, in order, and the compiled model."""

    reports: list[Report] = field(default_factory=list)
    compiled: weakref.ref[Any] | None = None

    def __reduce__(self) -> Any:
        return Kept, ()  # the copy of a compiled model has compiled nothing yet

    def add(self, report: Report) -> None:
        """Keep ``report``, and show it as the compiled model's ``attnfx_report``."""
        self.reports.append(report)
        compiled = self.compiled() if self.compiled is not None else None
        if compiled is not None:
            object.__setattr__(compiled, "attnfx_report", Report.merge(self.reports))


def keep(report: Report, seconds: float) -> None:
    """Keep the report of the graph that is being compiled, which took attnfx ``seconds``, with the model that it is for."""
    frames = _frames()
    owner = next((o for f in frames[:_DEPTH] if isinstance(o := f.f_locals.get("self"), torch._TorchCompileWrapper)), None)
    if owner is None:
        return
    frame = next((f for f in frames if f.f_code.co_name == "_compile" and "recompile_reason" in f.f_locals), None)
    known: dict[str, Any] = {} if frame is None else frame.f_locals
    compiling = Compile(
        graph=str(torch._guards.CompileContext.current_compile_id() or ""),
        function=_function(known.get("code")),
        reason=_reason(known.get("recompile_reason")),
        at=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        seconds=round(seconds, 3),
        attentions=len(report.sites),
    )
    _kept(owner).add(replace(report, compiles=(compiling,)))


def show(compiled: Any) -> Any:
    """``compiled``, made by torch.compile, with an attribute ``attnfx_report``: the report so far, None before the first call."""
    owner = owner_of(compiled)
    if owner is not None:
        _kept(owner).compiled = weakref.ref(compiled)
        object.__setattr__(compiled, "attnfx_report", None)
    return compiled


def owner_of(model: Any) -> Any:
    """The object of torch.compile that calls attnfx for ``model``; None where nothing was compiled by attnfx."""
    if isinstance(model, OptimizedModule):
        context: Any = model.dynamo_ctx
    else:
        if isinstance(model, nn.Module):  # model.compile(...), in place
            model = model._compiled_call_impl
        context = _context(model)
    backend = innermost_backend(getattr(context, "callback", None) or _nothing)
    ours = isinstance(backend, torch._TorchCompileWrapper) and getattr(backend.compiler_fn, "__module__", "") == "attnfx.backend"
    return backend if ours else None


def report_of(model: Any, call: Callable[[], Any] | None = None) -> Report | None:
    """What ran of a model that attnfx compiled, after ``call`` where it is given; None for any other model.

    Raises AttnfxError where nothing was compiled yet.
    """
    owner = owner_of(model)
    if owner is None:
        return None
    if call is not None:
        call()
    if not (reports := _kept(owner).reports):
        raise AttnfxError(
            "This model is compiled, and no graph of it was handed to attnfx: it has not run yet, or only a method that is "
            "not compiled (generate), or Dynamo took over what an equal torch.compile of the same model had compiled before. "
            "Call it first (after torch._dynamo.reset() in the last case), or give attnfx.explain the model's inputs."
        )
    return Report.merge(reports)


def original(model: Any) -> Any:
    """The model that attnfx compiled, or ``model`` itself."""
    if owner_of(model) is None:
        return model
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return model._call_impl if isinstance(model, nn.Module) else model


def _function(code: CodeType | None) -> str:
    if code is None or "/torch/_dynamo/" in code.co_filename.replace("\\", "/"):
        return ""  # Dynamo's own frame around a model whose class is torch's
    return f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"


def _reason(given: object) -> str:
    """Dynamo's reason for compiling a frame once more, in one line."""
    text = " ".join(str(given or "").split())
    if "BACKEND_MATCH" in text:
        return "another torch.compile of the same code, with another backend or other options"
    return text


def _kept(owner: Any) -> Kept:
    kept: Kept = owner.__dict__.setdefault(_KEPT, Kept())
    return kept


def _context(function: Any) -> Any:
    """The context of Dynamo that a compiled function, or a wrapper around one, enters."""
    function, seen = getattr(function, "__func__", function), set[int]()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if "self" in names and getattr(function, "_torchdynamo_wrapper_id", None) == id(function):
            return function.__closure__[names.index("self")].cell_contents
        function = getattr(function, "__wrapped__", None)
    return None


def _frames() -> list[FrameType]:
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _nothing() -> None: ...
