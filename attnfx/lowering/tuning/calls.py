"""When a call is searched for: the first one of each shape of a program that a compile asked for, forward and backward each.

The operators ask here before they launch. A search runs on the call's own tensors, in the call, and never while a CUDA graph is
captured.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnfx.errors import AttnfxWarning
from attnfx.lowering import replay
from attnfx.lowering.configs import Choice, target_of
from attnfx.lowering.decode import multiprocessors
from attnfx.lowering.tuning import cache, lookup, search, verify
from attnfx.lowering.tuning.compilers import Compiled, shared
from attnfx.lowering.tuning.entries import Entry
from attnfx.lowering.tuning.operands import Operands
from attnfx.lowering.tuning.progress import Tell, bar
from attnfx.lowering.tuning.shapes import Shape

#: Seconds that all searches of one attention and one shape may take, forward and backward together.
SECONDS = 60.0
#: Their share of them.
FORWARD, BACKWARD = 0.35, 0.65


@dataclass
class Session:
    """How searches are made: seconds for each attention and shape, who is told of progress (None: a bar on the terminal), and
    whether also for what is remembered; what they found, and how many kernels were remembered."""

    seconds: float = SECONDS
    tell: Tell | None = None
    again: bool = False
    outcomes: list[search.Outcome] = field(default_factory=list)
    remembered: int = 0


_requested: set[str] = set()
_done: set[str] = set()
_usual = Session()


def request(program: str) -> None:
    """From now on the first call of each shape of a program (`Program.key`) is searched for."""
    if program not in _requested:
        _requested.add(program)
        replay.forget()


def requested(program: str) -> bool:
    """Whether somebody asked for that: all that a call costs where nobody did."""
    return program in _requested


def forget() -> None:
    """Nothing is asked for, and nothing is done."""
    _requested.clear()
    _done.clear()


@contextmanager
def session(made: Session) -> Iterator[Session]:
    """Searches within it are made so, in every thread: backward runs in one of its own."""
    global _usual
    before, _usual = _usual, made
    try:
        yield made
    finally:
        _usual = before


def prepare(operands: Operands) -> None:
    """Search for the kernels of a call, unless that was done or is remembered; what fails leaves the shipped configurations."""
    device = operands.q.device
    who = cache.identity(device)
    if who is None or 0 in operands.q.shape or operands.k.shape[2] == 0 or _capturing(device):
        return
    call = operands.key("forward" if operands.grad_out is None else "backward")
    if call in _done:
        return
    _done.add(call)
    try:
        with _disable_current_modes(), torch.no_grad(), current(device), cache.searching(who, _usual.seconds) as may:
            lookup.replace(device, cache.load(who))
            if not may:
                return  # another process is at it, and took all of the time
            with bar() if _usual.tell is None else nullcontext(_usual.tell) as tell:
                _search(operands, who, _usual, tell)
    except Exception as error:
        text = f"attnfx could not tune an attention ({type(error).__name__}: {error}); it runs in the shipped configuration."
        warnings.warn(text, AttnfxWarning, stacklevel=2)


def _search(operands: Operands, who: cache.Identity, how: Session, tell: Tell) -> None:
    """All kernels of a call that are not remembered."""
    device, target = operands.q.device, target_of(operands.q.device)
    known = lookup.table(device)
    launched = operands.kernels(target)
    kernels = {k: c for k, c in launched.items() if how.again or operands.key(k) not in known}
    how.remembered += len(launched) - len(kernels)
    share = (FORWARD if operands.grad_out is None else BACKWARD) * how.seconds
    for left, (kernel, start) in zip(range(len(kernels), 0, -1), kernels.items(), strict=True):
        subject = OnDevice(operands, kernel, start, target)
        compile = partial(_compiled, subject)
        means = search.Means(target, multiprocessors(device), compile, timer, tell=tell)
        found = search.search(subject, verify.reference(operands, kernel), means, share / left)
        share -= min(found.seconds, share)
        how.outcomes.append(found)
        if found.failure:
            warnings.warn(f"attnfx does not tune {kernel} of {found.shape}: {found.failure}.", AttnfxWarning, stacklevel=4)
            continue
        lookup.replace(device, cache.add(who, {operands.key(kernel): entry(found, str(operands.plan.site))}))


def entry(found: search.Outcome, about: str) -> Entry:
    """What is remembered of a search."""
    text = f"{found.shape}: {about}"[:300]
    return Entry(
        found.best, round(found.best_ms, 5), round(found.start_ms, 5), text, str(datetime.date.today()), found.timed, found.dropped
    )


@dataclass(frozen=True)
class OnDevice:
    """A kernel of a call on the device of its tensors (`search.Subject`)."""

    operands: Operands
    kernel: str
    start: Choice
    target: str

    @property
    def shape(self) -> Shape:
        return self.operands.shape(self.kernel)

    def run(self, choice: Choice) -> tuple[Tensor, ...]:
        return self.operands.run(self.kernel, choice)

    def launcher(self, choice: Choice) -> Callable[[], None]:
        return self.operands.launcher(self.kernel, choice, self.target)


def timer(call: Callable[[], None], milliseconds: float) -> float:
    """Median by CUDA events, with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=milliseconds / 4, rep=milliseconds, return_mode="median"))


def _compiled(subject: OnDevice, choices: Any, seconds: float) -> Iterator[tuple[Choice, Compiled]]:
    """Candidates that are in Triton's cache on disk now."""
    import triton

    gpu = triton.runtime.driver.active.get_current_target()
    job = {
        "operands": subject.operands.to_data(), "kernel": subject.kernel, "cache": triton.knobs.cache.dir,
        "target": [subject.target, gpu.backend, gpu.arch, gpu.warp_size],
    }  # fmt: skip
    try:
        yield from shared.get().compile(job, choices, seconds)
    finally:
        shared.rest()


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, or a call is made that takes memory from the pool of one."""
    if device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing() or _warming_up(device)


def _warming_up(device: torch.device) -> bool:
    """Whether Inductor runs a graph for the first times, before it captures it: it owns all memory that is taken meanwhile."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device() if device.index is None else device.index, create_if_none_exists=False)
    if manager is None or not manager.in_warmup:
        return False
    text = (
        "attnfx does not tune an attention inside of Inductor's CUDA graphs; it runs in the shipped configuration, or in the one "
        "that `attnfx tune` or mode max-autotune-no-cudagraphs found."
    )
    warnings.warn(text, AttnfxWarning, stacklevel=3)
    return True
