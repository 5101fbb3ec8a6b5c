"""Runs a generation under a backend, counts what Dynamo compiles, and keeps attnfx's reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters

from attnfx import backend
from attnfx.report import Report

#: attnfx, and what it does to the graph left to eager: a C++ compiler adds time here and nothing to see.
OURS = (backend.attnfx, {"inner": "eager", "strict": True})

#: Why a decoder that starts from one token, and attends to that token alone, stays as it was for that step.
SINGLE = "it has a single key, whose weight is always 1: there is nothing to compute"


@dataclass(frozen=True)
class Watched:
    """What a run returned, how many graphs Dynamo compiled, the attentions rewritten, and why others were not."""

    result: Any
    compiles: int
    sites: int
    missed: frozenset[str]


def watched(run: Callable[[Any, Any], Any], plain: str | None = None) -> Watched:
    """`run(backend, options)` from an empty cache of compiled code; with `plain`, the name of another backend, under that one."""
    torch._dynamo.reset()
    counters.clear()
    reports: list[Report] = []
    token = backend.listeners.set((reports.append,))
    try:
        result = run(*((plain, None) if plain else OURS))
        compiles = counters["stats"]["unique_graphs"]
    finally:
        backend.listeners.reset(token)
        torch._dynamo.reset()
    return Watched(result, compiles, sum(len(r.sites) for r in reports), frozenset(m.reason for r in reports for m in r.missed))
