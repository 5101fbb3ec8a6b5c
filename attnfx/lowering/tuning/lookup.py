"""What a launch knows of tuning: the configuration that was found for calls like this one, by a lookup that costs microseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

from attnfx.lowering import replay
from attnfx.lowering.configs import Choice, Config, Tile
from attnfx.lowering.launch import recorded_target
from attnfx.lowering.tuning import cache
from attnfx.lowering.tuning.entries import Entry, Remembered
from attnfx.lowering.tuning.shapes import Shape

T = TypeVar("T")
#: Calls that are told apart before their answers are forgotten: lengths that grow by one would be told apart for ever.
REMEMBERED = 4096

_tables: dict[torch.device, Mapping[str, Remembered]] = {}
_answers: dict[tuple[object, ...], Choice | None] = {}
_FORCED: ContextVar[Mapping[str, Choice] | None] = ContextVar("attnfx_forced_configurations", default=None)


def tuned(kernel: str, program: str, q: Tensor, k: Tensor, v: Tensor, lists: bool, dropout: bool) -> Config | None:
    """The configuration of a flash kernel for a program (`Program.key`) and a call; None: the shipped one."""
    found = _found(kernel, program, q, k, v, lists, dropout)
    return found if isinstance(found, Config) else None


def tuned_tile(program: str, q: Tensor, k: Tensor, v: Tensor, dropout: bool) -> Tile | None:
    """The same for the split-KV kernels."""
    found = _found("decode", program, q, k, v, False, dropout)
    return found if isinstance(found, Tile) else None


def table(device: torch.device) -> Mapping[str, Remembered]:
    """All that is remembered for a device, read from its file once."""
    found = _tables.get(device)
    if found is None:
        who = cache.identity(device)
        found = _tables[device] = {} if who is None else cache.load(who)
    return found


def replace(device: torch.device, entries: Mapping[str, Remembered]) -> None:
    """From now on ``entries`` are what is remembered."""
    _tables[device] = entries
    _answers.clear()
    replay.forget()


def forget() -> None:
    """Read the files again at the next call."""
    _tables.clear()
    _answers.clear()
    replay.forget()


@contextmanager
def forced(choices: Mapping[str, Choice]) -> Iterator[None]:
    """Within it these configurations run, by kernel, and the shipped ones of all other kernels."""
    token = _FORCED.set(choices)
    try:
        yield
    finally:
        _FORCED.reset(token)


def safely(call: Callable[[], T]) -> T:
    """``call()``; once more with the shipped configurations where a tuned one does not compile or does not fit here."""
    try:
        return call()
    except TritonError:
        if _FORCED.get() is not None or not any(_tables.values()):
            raise
        with forced({}):
            return call()


def _found(kernel: str, program: str, q: Tensor, k: Tensor, v: Tensor, lists: bool, dropout: bool) -> Choice | None:
    choices = _FORCED.get()
    if choices is not None:
        return choices.get(kernel)
    if not program or recorded_target() is not None:
        return None
    known = table(q.device)
    if not known:
        return None
    # all that an entry's name is made of
    call = (kernel, program, q.device, q.dtype, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), lists, dropout)
    if call in _answers:
        return _answers[call]
    entry = known.get(Shape.of(q, k, v, lists, dropout).key(program, kernel))
    if len(_answers) >= REMEMBERED:
        _answers.clear()
    _answers[call] = found = entry.choice if isinstance(entry, Entry) else None
    return found
