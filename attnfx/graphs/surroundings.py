"""The modes of the process that looking at a graph, or running one aside, must leave as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental import proxy_tensor

from attnfx.graphs import levels


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the global modes that graph nodes switch (grad mode, autocast) however tracing ends."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for device in ("cpu", "cuda"):
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            stack.callback(torch.set_autocast_dtype, device, dtype)
            stack.callback(torch.set_autocast_enabled, device, enabled)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(levels.restored())
        stack.enter_context(_unlogged("torch._subclasses.fake_tensor"))
        yield


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Operations that fail while a graph is looked at are no errors: they become opaque."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def formats_unasked() -> Iterator[None]:
    """Tracing notes the memory format of every tensor, which nothing here reads: without guards on the strides of sliced inputs."""
    noted = proxy_tensor._extract_tensor_metadata  # type: ignore[attr-defined]

    def note(*args: Any, **kwargs: Any) -> Any:
        with symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return noted(*args, **kwargs)

    with mock.patch.object(proxy_tensor, "_extract_tensor_metadata", note):
        yield
