"""One door through which every kernel is launched, and a recorder that keeps the launches instead of making them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import triton
from torch.utils._python_dispatch import _disable_current_modes

#: Is told of a launch: the `@triton.jit` function, the grid, the positional and the keyword arguments, and what the launch gave.
Watcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any], Any], None]


@dataclass(frozen=True)
class Call:
    """A launch that was not made: the `@triton.jit` function, its positional and its keyword arguments, and its grid."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    grid: tuple[int, ...] = (1,)

    def make(self) -> None:
        """Launch it, now."""
        self.kernel[self.grid](*self.arguments, **self.keywords)

    @property
    def given(self) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.keywords


@dataclass(frozen=True)
class Recording:
    """The launches for a target (a key of `configs.SHARED_LIMIT`), in order."""

    target: str
    calls: list[Call] = field(default_factory=list)


_RECORDING: ContextVar[Recording | None] = ContextVar("attnfx_launch_recording", default=None)
_WATCHER: ContextVar[Watcher | None] = ContextVar("attnfx_launch_watcher", default=None)
_COMPILING: ContextVar[str | None] = ContextVar("attnfx_compiling_for", default=None)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
    """Launch `kernel` over `grid`, or record the launch inside `recording`."""
    recording, watcher = _RECORDING.get(), _WATCHER.get()
    if recording is not None:
        recording.calls.append(Call(kernel, arguments, keywords, grid))
        return
    if watcher is None:
        kernel[grid](*arguments, **keywords)
        return
    with _disable_current_modes():
        compiled = kernel[grid](*arguments, **keywords)
    watcher(kernel, grid, arguments, keywords, compiled)


def real() -> bool:
    """Whether launches are made, and for the device that is here."""
    return _RECORDING.get() is None and _COMPILING.get() is None


def recorded_target() -> str | None:
    """The target being recorded for, None where launches are real."""
    recording = _RECORDING.get()
    return recording.target if recording else None


def backend() -> str:
    """Triton's name of what kernels are compiled for just now: "cuda", "hip", or "interpreter"."""
    elsewhere = _COMPILING.get()
    if elsewhere is not None:
        return elsewhere
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


# so that kernels may ask while they are compiled
backend.__triton_builtin__ = True  # type: ignore[attr-defined]


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within it each launch that was made is told to ``watcher``."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Within it kernels are compiled for a GPU that is not here, of the backend `name`."""
    token = _COMPILING.set(name)
    try:
        yield
    finally:
        _COMPILING.reset(token)


@contextmanager
def recording(target: str) -> Iterator[Recording]:
    """Within it the host functions run on meta tensors and pick blocks for `target`; nothing is launched."""
    made = Recording(target)
    token = _RECORDING.set(made)
    try:
        yield made
    finally:
        _RECORDING.reset(token)
