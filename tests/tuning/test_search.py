"""The search with a timer, a clock and compilers of the test's own: what wins, what is dropped and why, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attnfx.lowering.configs import Choice, Config
from attnfx.lowering.tuning import search as searching
from attnfx.lowering.tuning.compilers import Compiled
from attnfx.lowering.tuning.search import Means, Outcome, search
from attnfx.lowering.tuning.shapes import Shape
from attnfx.lowering.tuning.verify import bound, differs, farthest_row

SHAPE = Shape(2, 8, 8, 4096, 4096, 64, 64, torch.bfloat16)
START = Config(64, 64, 4, 3)
BEST = Config(128, 64, 8, 2, tma=False)
RIGHT = torch.arange(1.0, 7.0).view(2, 3)


@dataclass
class World:
    """A kernel that takes ``ms`` milliseconds and gives ``result``; compiling and timing take seconds of a clock of its own."""

    ms: Callable[[Config], float]
    result: Callable[[Config], Tensor] = lambda choice: RIGHT
    compiled: Callable[[Config], Compiled] = lambda choice: Compiled(shared=1000)
    seconds_each: float = 0.0
    kernel: str = "forward"
    shape: Shape = SHAPE
    start: Choice = START
    now: float = 0.0
    current: Config = START
    ran: list[Config] = field(default_factory=list)
    timed: list[Config] = field(default_factory=list)
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def run(self, choice: Any) -> Sequence[Tensor]:
        self.ran.append(choice)
        return (self.result(choice),)

    def launcher(self, choice: Any) -> Callable[[], None]:
        def launch() -> None:
            self.current = choice

        return launch

    def time(self, call: Callable[[], None], milliseconds: float) -> float:
        call()
        self.timed.append(self.current)
        self.now += self.seconds_each
        return self.ms(self.current)

    def compile(self, choices: Sequence[Choice], seconds: float) -> Iterator[tuple[Choice, Compiled]]:
        end = self.now + seconds
        for choice in choices:
            if self.now + self.seconds_each > end:
                return
            self.now += self.seconds_each
            assert isinstance(choice, Config)
            yield choice, self.compiled(choice)

    def searched(self, wanted: Sequence[Tensor] | None = (RIGHT,), seconds: float = 1e6) -> Outcome:
        means = Means("sm90", 132, self.compile, self.time, lambda: self.now, lambda *news: self.told.append(news))
        return search(self, wanted, means, seconds)


def _distance(choice: Config) -> float:
    """A time that is least at BEST, and lower the more fields agree with it."""
    names = ("block_m", "block_n", "num_warps", "num_stages", "tma")
    return 1.0 + sum(getattr(choice, name) != getattr(BEST, name) for name in names)


def test_the_fastest_is_found_step_by_step() -> None:
    world = World(_distance)
    found = world.searched()
    assert found.best == BEST  # the grid differs from it in two fields
    assert (found.best_ms, found.start_ms) == (1.0, 5.0)
    assert found.gain == found.start_ms / found.best_ms
    assert world.told[-1][0] == "forward"
    assert world.told[-1][1] == world.told[-1][2]
    assert world.ran[0] == START


def test_what_saves_too_little_is_not_worth_an_entry() -> None:
    assert World(lambda c: 1.0 if c == START else 0.99).searched().best == START
    assert World(lambda c: 1.0 if c == START else 0.97).searched().best != START


def test_a_lucky_first_measurement_does_not_win() -> None:
    lucky, count = Config(128, 64, 8, 3), {"lucky": 0}

    def ms(choice: Config) -> float:
        if choice != lucky:
            return 1.0
        count["lucky"] += 1
        return 0.5 if count["lucky"] == 1 else 1.1

    found = World(ms).searched()
    assert count["lucky"] > 1
    assert found.best == START


def test_a_wrong_candidate_is_dropped_before_it_is_timed() -> None:
    def result(choice: Config) -> Tensor:
        return RIGHT if choice.block_m != 128 else RIGHT + torch.tensor([0.0, 0.0, 1.0])

    world = World(_distance, result)
    found = world.searched()
    assert isinstance(found.best, Config)
    assert found.best.block_m != 128
    assert found.dropped["a wrong result"] > 3
    assert all(c.block_m != 128 for c in world.timed)
    assert any(c.block_m == 128 for c in world.ran)


def test_candidates_that_fail_are_dropped_with_the_reason() -> None:
    def ms(choice: Config) -> float:
        if choice.block_n == 32:
            raise RuntimeError("an illegal instruction")
        if choice.block_n == 128:
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    def compiled(choice: Config) -> Compiled:
        if choice.block_m == 32:
            return Compiled(error="ptxas: too hard\nmore")
        return Compiled(shared=300_000 if choice.num_warps == 8 else 1000, spills=5000 if choice.num_stages == 1 else 0)

    dropped = World(ms, compiled=compiled).searched().dropped
    assert set(dropped) >= {
        "does not run: RuntimeError", "no memory to run it beside the model", "does not compile: ptxas: too hard",
        "too much shared memory", "more than 2048 bytes a thread are spilled",
    }  # fmt: skip


def test_what_cannot_fit_is_never_compiled() -> None:
    compiled: list[Config] = []

    def compile(choice: Config) -> Compiled:
        compiled.append(choice)
        return Compiled()

    world = World(lambda c: 1.0, compiled=compile, kernel="key_gradient", shape=replace(SHAPE, head_dim=128, value_dim=128))
    found = world.searched()
    assert found.dropped["does not fit by arithmetic"] > 2
    assert compiled
    assert not any(c.block_n == 128 and c.num_warps == 4 for c in compiled)


@pytest.mark.parametrize("seconds", [0.0, 3.0, 10.0, 30.0])
def test_the_seconds_are_kept(seconds: float) -> None:
    world = World(_distance, seconds_each=1.0)
    found = world.searched(seconds=seconds)
    last = (searching.FINALISTS + 1) * searching.ROUNDS  # the last measurement is not left out
    assert found.seconds == world.now <= seconds + last + 2.0
    assert found.best_ms <= found.start_ms
    assert found.timed >= 1
    if seconds == 0.0:
        assert found.best == START
        assert found.dropped["not compiled in time"] > 10
    if seconds == 10.0:
        assert 2 <= found.timed <= 10
        assert found.dropped["not compiled in time"] + found.dropped.get("not timed in time", 0) > 10


def test_more_seconds_find_more() -> None:
    assert World(_distance, seconds_each=1.0).searched(seconds=200.0).best_ms < World(_distance).searched(seconds=0.0).best_ms


def test_a_shipped_configuration_that_is_wrong_ends_the_search() -> None:
    world = World(_distance, lambda choice: RIGHT + 1)
    found = world.searched()
    assert found.best == START
    assert "does not give what the reference gives" in found.failure
    assert world.timed == []


def test_without_a_reference_the_shipped_result_is_it() -> None:
    found = World(_distance, lambda choice: RIGHT + 1).searched(wanted=None)
    assert not found.failure
    assert found.best != START


def test_rounding_is_no_difference_and_a_wrong_row_is_one() -> None:
    torch.manual_seed(0)
    exact = torch.randn(2, 4, 300, 64)
    half = exact.bfloat16()
    again = (exact * (1 + 2e-3 * torch.randn(exact.shape))).bfloat16()
    assert differs([again], [half], torch.bfloat16) is None
    wrong = half.clone()
    wrong[1, 3, 299] = half[1, 3, 298]  # one row of 2400: 0.05 of the whole in L2
    assert "a row differs by" in str(differs([wrong], [half], torch.bfloat16))
    assert farthest_row(half, half) == 0.0
    assert bound(torch.float32) < bound(torch.float16) < bound(torch.bfloat16)


def test_infinities_and_nans_have_their_places() -> None:
    want = torch.tensor([[1.0, float("nan"), float("-inf")], [2.0, 3.0, 4.0]])
    assert farthest_row(want.clone(), want) == 0.0
    for value in (float("inf"), 0.0, float("nan")):
        got = want.clone()
        got[0, 2] = value
        assert farthest_row(got, want) == float("inf")
    got = want.clone()
    got[1, 1] = float("nan")
    assert farthest_row(got, want) == float("inf")
    assert "shape" in str(differs([want[:1]], [want], torch.float32))
    assert farthest_row(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
