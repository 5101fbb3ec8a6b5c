"""A compiled model that is compared with itself at every call, and counted."""

from __future__ import annotations

from typing import Any

import torch
from graphs import assert_same
from torch import Tensor

import attnfx
from attnfx.backend import listeners
from attnfx.report import Report


class Watched:
    """A model compiled with attnfx, compared with itself at every call; ``reports`` has one entry for each compile."""

    def __init__(self, model: Any, dynamic: bool | None = None, **options: Any) -> None:
        torch._dynamo.reset()
        self.model, self.reports = model, list[Report]()
        given = {"inner": "eager", "strict": True, **options}
        self.compiled = torch.compile(model, backend=attnfx.backend.attnfx, dynamic=dynamic, options=given)

    def __call__(self, *args: Tensor) -> int:
        """How many compiles there were up to now."""
        token = listeners.set((self.reports.append,))
        try:
            assert_same(self.compiled(*args), self.model(*args))
        finally:
            listeners.reset(token)
        return len(self.reports)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for site in self.reports[-1].sites for name in site.buffers)
