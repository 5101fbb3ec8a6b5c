"""Export: a model as an ExportedProgram in which every attention is one operator.

The model is exported as torch does it, the exported graph is rewritten, and the rewritten graph is exported again, so that the
program is
one that torch made: verified, with ranges and signatures of its own, ready for `torch.export.save`. Whoever loads it imports
`attnfx.lowering.vendor` first, which registers the operators; nothing else of attnfx is needed to run it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from attnfx import backend
from attnfx.options import Options


def rewritten(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None, **options: Any
) -> fx.GraphModule:
    """``model`` as a GraphModule with its attentions replaced; called like the model, with parameters that are the model's own.

    ``args``, ``kwargs`` and ``dynamic_shapes`` are those of torch.export.export; ``options`` those of
    :class:`attnfx.options.Options`.
    Raises what torch.export raises for a model that it cannot take, and what the options ask for.
    """
    parsed = Options.parse(None, {"inner": "eager", **options})
    program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    unchecked = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    graph = program.module(**unchecked)
    assert isinstance(graph, fx.GraphModule)
    done, report = backend.rewrite(graph, parsed)
    for listen in backend.listeners.get():
        listen(report)
    return done


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None, **options: Any
) -> ExportedProgram:
    """``torch.export.export`` of ``model`` with its attentions replaced; arguments as for :func:`rewritten`."""
    graph = rewritten(model, args, kwargs, dynamic_shapes=dynamic_shapes, **options)
    return torch.export.export(graph, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
