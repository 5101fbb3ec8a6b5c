"""The search for one kernel's configuration: prune by arithmetic, compile side by side, compare with the reference, time.

The grid of tiles and warps comes first, then the neighbours of its best; what is not compiled or timed when the seconds are over is
left. The shipped configuration is what everything has to beat, in a second and longer measurement beside it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attnfx.lowering.configs import SHARED_LIMIT, Choice
from attnfx.lowering.tuning import model, space
from attnfx.lowering.tuning.compilers import Compiled
from attnfx.lowering.tuning.shapes import Shape
from attnfx.lowering.tuning.verify import differs

#: Milliseconds of a call, the median, from about so many milliseconds of calls.
Timer = Callable[[Callable[[], None], float], float]
#: Compiles candidates within some seconds, and yields those that are ready.
Compile = Callable[[Sequence[Choice], float], Iterator[tuple[Choice, Compiled]]]

#: Milliseconds of calls behind a first and behind a last measurement, and how often the last one is repeated.
ROUGH, FINE, ROUNDS = 20.0, 60.0, 3
#: Candidates that are measured again, and the share of time that one must save to be worth an entry.
FINALISTS, WORTH = 3, 0.02
#: Candidates of the grid, and of the neighbours, that are compiled, and how often there are neighbours of better neighbours.
GRID, NEIGHBOURS, STEPS = 32, 16, 2
#: The share of the seconds after which compiling the grid ends.
COMPILING = 0.5


class Subject(Protocol):
    """A kernel in a call: what it gives in a configuration, and what launches it alone."""

    @property
    def kernel(self) -> str: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def start(self) -> Choice:
        """What runs without a search."""
        ...

    def run(self, choice: Choice) -> Sequence[Tensor]: ...

    def launcher(self, choice: Choice) -> Callable[[], None]: ...


@dataclass(frozen=True)
class Means:
    """What a search works with: the device's target and multiprocessors, compilers, a timer, a clock in seconds, and who is told,
    after each candidate, how many of how many are done and the best time so far."""

    target: str
    multiprocessors: int
    compile: Compile
    timer: Timer
    clock: Callable[[], float] = time.monotonic
    tell: Callable[[str, int, int, float], None] = lambda kernel, done, of, best: None


@dataclass(frozen=True)
class Outcome:
    """What a search found; ``dropped``: how many candidates were not timed, by reason; ``failure``: why there was no search."""

    kernel: str
    shape: Shape
    start: Choice
    best: Choice
    start_ms: float
    best_ms: float
    timed: int
    dropped: dict[str, int]
    seconds: float
    failure: str = ""

    @property
    def gain(self) -> float:
        return self.start_ms / self.best_ms if self.best_ms else 1.0


def search(subject: Subject, wanted: Sequence[Tensor] | None, means: Means, seconds: float) -> Outcome:
    """The fastest configuration that gives what is ``wanted`` (None: what the shipped one gives), within so many seconds."""
    begun = means.clock()
    found = _Search(subject, means, begun + seconds)
    given = subject.run(subject.start)
    failure = None if wanted is None else differs(given, wanted, subject.shape.dtype)
    if failure is not None:
        return found.outcome(begun, f"the shipped configuration does not give what the reference gives: {failure}")
    found.wanted = given if wanted is None else wanted
    found.times[subject.start] = means.timer(subject.launcher(subject.start), ROUGH)
    grid = found.promising(space.coarse(subject.kernel, subject.shape, subject.start), GRID)
    found.visit(grid, COMPILING * seconds)
    for _ in range(STEPS):
        leaders = sorted(found.times, key=found.times.__getitem__)[:FINALISTS]
        moved = space.near(subject.kernel, subject.shape, means.target, leaders, [*found.times, *found.seen])
        around = [c for c in moved if not found.pruned(c)]
        found.visit(around[:NEIGHBOURS], found.left() * COMPILING)
        if min(found.times, key=found.times.__getitem__) in leaders:
            break
    return found.outcome(begun)


@dataclass
class _Search:
    """What is known so far."""

    subject: Subject
    means: Means
    end: float
    wanted: Sequence[Tensor] = ()
    times: dict[Choice, float] = field(default_factory=dict)
    seen: set[Choice] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)

    def left(self) -> float:
        return self.end - self.means.clock()

    def pruned(self, choice: Choice) -> bool:
        s, m = self.subject, self.means
        if model.objection(s.kernel, choice, s.shape, m.target, m.multiprocessors) is None:
            return False
        self.dropped["does not fit by arithmetic"] += 1
        return True

    def promising(self, choices: Sequence[Choice], most: int) -> list[Choice]:
        """What may fit, the lowest estimated cost first."""
        s, m = self.subject, self.means
        fitting = [c for c in choices if not self.pruned(c)]
        fitting.sort(key=lambda c: model.estimate(s.kernel, c, s.shape, m.target, m.multiprocessors).cost)
        if len(fitting) > most:
            self.dropped["others promise more"] += len(fitting) - most
        return fitting[:most]

    def visit(self, choices: Sequence[Choice], compiling: float) -> None:
        """Compile, compare and time, until the seconds are over."""
        self.seen.update(choices)
        ready = list(self.means.compile(choices, min(compiling, self.left())))
        if len(ready) < len(choices):
            self.dropped["not compiled in time"] += len(choices) - len(ready)
        for number, (choice, made) in enumerate(ready):
            if self.left() <= 0:
                self.dropped["not timed in time"] += len(ready) - number
                return
            reason = self._objection(made) or self._timed(choice)
            if reason is not None:
                self.dropped[reason] += 1
            best = min(self.times.values(), default=float("nan"))
            self.means.tell(self.subject.kernel, number + 1, len(ready), best)

    def _objection(self, made: Compiled) -> str | None:
        if made.error:
            return f"does not compile: {made.error.splitlines()[0][:120]}"
        if made.shared > SHARED_LIMIT[self.means.target]:
            return "too much shared memory"
        if made.spills > model.SPILLED:
            return f"more than {model.SPILLED} bytes a thread are spilled"
        return None

    def _timed(self, choice: Choice) -> str | None:
        """Why a candidate has no time; None where it has one now."""
        try:
            if differs(self.subject.run(choice), self.wanted, self.subject.shape.dtype) is not None:
                return "a wrong result"
            self.times[choice] = self.means.timer(self.subject.launcher(choice), ROUGH)
        except torch.OutOfMemoryError:
            return "no memory to run it beside the model"
        except Exception as error:  # a candidate that fails is dropped, whatever it fails with
            return f"does not run: {type(error).__name__}"
        return None

    def outcome(self, begun: float, failure: str = "") -> Outcome:
        """The winner of a last measurement of the best ones beside the shipped one."""
        s, start = self.subject, self.subject.start
        finalists = sorted((c for c in self.times if c != start), key=self.times.__getitem__)[:FINALISTS]
        best, times = start, {start: self.times.get(start, float("nan"))}
        if finalists and min(self.times[c] for c in finalists) < self.times[start]:
            times = self._again([start, *finalists])
            fastest = min(times, key=times.__getitem__)
            if times[fastest] <= (1.0 - WORTH) * times[start]:
                best = fastest
        spent = self.means.clock() - begun
        timed, dropped = len(self.times), dict(self.dropped)
        return Outcome(s.kernel, s.shape, start, best, times[start], times[best], timed, dropped, spent, failure)

    def _again(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        """The median of some rounds, each of which measures all of them."""
        rounds = [{c: self.means.timer(self.subject.launcher(c), FINE) for c in choices} for _ in range(ROUNDS)]
        return {c: statistics.median(r[c] for r in rounds) for c in choices}
