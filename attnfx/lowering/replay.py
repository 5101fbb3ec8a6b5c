"""Calls that were made before, made again without what led to them: the torch operations and the launches, on other tensors.

What an operator does follows from its plan and from the shapes, strides and dtypes of its tensors, never from their values. The
second call of a kind is watched: a dispatch mode sees each torch operation, `launch.watched` each launch. The third is made both
ways, and its results compared bit by bit. Later calls of the kind repeat the steps, without checks, choice of blocks, or binding of
arguments to a compiled kernel. What cannot be repeated, an operation that gives a number to the host or a tensor from elsewhere,
is not remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from attnfx.lowering import launch

#: Kinds of calls that are remembered before all are forgotten: lengths that grow by one would be remembered for ever.
REMEMBERED = 1024
T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Values = list[Any]
Step = Callable[[Values], None]
Fill = Callable[[Values], Any]

_seen: set[tuple[Any, ...]] = set()
_tapes: dict[tuple[Any, ...], Tape | None] = {}
_proved: set[tuple[Any, ...]] = set()


def _compared(call: Callable[[], T], tape: Tape, kind: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> T:
    """The call as it was made before, and its tape tried beside it."""
    result = call()
    if any(t is not None and t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return result  # nothing can be compared in a graph
    try:
        same = _same_bits(result, tape.play(tensors))
    except Exception:  # of whatever kind, memory too small for both among them: the call is right without a tape
        same = False
    if same:
        _proved.add(kind)
    else:
        _tapes[kind] = None
        _LOG.warning("a call of %s is not made again: its steps failed, or gave another result", kind[0][0])
    return result


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        bits = _BITS[one.dtype.itemsize]  # so that NaN is NaN, and -0.0 is not 0.0
        return one.shape == other.shape and one.stride() == other.stride() and torch.equal(one.view(bits), other.view(bits))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same_bits, one, other))
    return bool(one == other)


class Unrepeatable(Exception):
    """A call that cannot be made again from its steps."""


@dataclass(frozen=True)
class Tape:
    """The steps of a call, and how what it gives is found among their values."""

    steps: tuple[Step, ...]
    result: Fill

    def play(self, tensors: Sequence[Tensor | None]) -> Any:
        values: Values = [*tensors]
        with _current(tensors):
            for step in self.steps:
                step(values)
        return self.result(values)


def repeated(call: Callable[[], T], about: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> T:
    """``call()``, or the same from a tape. ``tensors`` are all that it reads, ``about`` is all else that it depends on."""
    if not launch.real():
        return call()
    kind = (about, torch.are_deterministic_algorithms_enabled(), *map(_kind, tensors))
    if kind in _tapes:
        tape = _tapes[kind]
        if tape is None:
            return call()
        return cast(T, tape.play(tensors)) if kind in _proved else _compared(call, tape, kind, tensors)
    if kind in _seen:
        return _watched(call, kind, tensors)
    if len(_seen) >= REMEMBERED:
        forget()
    _seen.add(kind)
    return call()


def forget() -> None:
    """All calls are made anew: what they depend on has changed."""
    for kept in (_seen, _tapes, _proved):
        kept.clear()


def _kind(tensor: Tensor | None) -> Any:
    """All of a tensor that a call may depend on; kernels are compiled for pointers to multiples of 16 bytes, or for any."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def _watched(call: Callable[[], T], kind: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> T:
    watch = _Watch(tensors)
    with watch, launch.watched(watch.launched):
        result = call()
    try:
        _tapes[kind] = watch.tape(result)
    except Unrepeatable:
        _tapes[kind] = None
    return result


_ATEN = torch.ops.aten
_ALLOCATIONS = frozenset((_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.new_empty.default))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what happens within it."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: Values = [*tensors]  # kept, so that no other tensor takes the identity of one
        self.places = {id(t): place for place, t in enumerate(tensors) if t is not None}
        self.steps: list[Step] = []
        self.failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            given = self.fill(args), {name: self.fill(value) for name, value in kwargs.items()}
        except Unrepeatable:
            self.failed = True
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        several = isinstance(result, list | tuple)
        for made in result if several else (result,):
            self.failed = self.failed or not isinstance(made, Tensor)
            self.places[id(made)] = len(self.values)
            self.values.append(made)
        if func in _ALLOCATIONS:
            made = partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device=result.device)
            self.steps.append(partial(_allocate, made))
        else:
            self.steps.append(partial(_operate, func, *given, several))
        return result

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> None:
        """A launch, and the compiled kernel that it came to; None in Triton's interpreter."""
        try:
            if made is None:
                self.steps.append(partial(_interpret, kernel[grid], self.fill(arguments), keywords))
            else:
                named = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
                self.steps.append(partial(_launch, made[(*grid, 1, 1)[:3]], self.fill(tuple(named[n] for n in kernel.arg_names))))
        except (Unrepeatable, KeyError):
            self.failed = True

    def tape(self, result: Any) -> Tape:
        """What was watched, which gave ``result``. Raises Unrepeatable."""
        if self.failed:
            raise Unrepeatable
        return Tape(tuple(self.steps), self.fill(result))

    def fill(self, value: Any) -> Fill:
        """How ``value`` is made from the values of another call. Raises Unrepeatable for a tensor that came from elsewhere."""
        return self._open(value) or partial(_same, value)

    def _open(self, value: Any) -> Fill | None:
        """None: ``value`` holds no tensor."""
        if isinstance(value, Tensor):
            if id(value) not in self.places:
                raise Unrepeatable
            return itemgetter(self.places[id(value)])
        if isinstance(value, TensorDescriptor):
            return partial(_described, value.shape, value.strides, value.block_shape, self.fill(value.base))
        if isinstance(value, dict):
            raise Unrepeatable
        if not isinstance(value, tuple | list):
            return None
        holes = [(place, found) for place, item in enumerate(value) if (found := self._open(item)) is not None]
        if not holes:
            return None
        closed = [*value]
        for place, _ in holes:
            closed[place] = None  # a tape that held a tensor would keep its memory for ever
        kind = type(value)
        return partial(_filled, closed, holes, getattr(kind, "_make", kind))


def _same(value: Any, values: Values) -> Any:
    return value


def _filled(closed: list[Any], holes: list[tuple[int, Fill]], kind: Any, values: Values) -> Any:
    whole = closed.copy()
    for place, fill in holes:
        whole[place] = fill(values)
    return whole if kind is list else kind(whole)


def _allocate(made: Callable[[], Tensor], values: Values) -> None:
    values.append(made())


def _operate(func: Any, arguments: Fill, keywords: dict[str, Fill], several: bool, values: Values) -> None:
    result = func(*arguments(values), **{name: fill(values) for name, fill in keywords.items()})
    values.extend(result) if several else values.append(result)


def _launch(run: Any, arguments: Fill, values: Values) -> None:
    run(*arguments(values))


def _interpret(run: Any, arguments: Fill, keywords: dict[str, Any], values: Values) -> None:
    run(*arguments(values), **keywords)


def _described(shape: list[int], strides: list[int], block: list[int], base: Fill, values: Values) -> TensorDescriptor:
    return TensorDescriptor(base(values), shape, strides, block)


def _current(tensors: Sequence[Tensor | None]) -> AbstractContextManager[None]:
    """Makes the tensors' GPU current: Triton launches on the current one."""
    first = next((t for t in tensors if t is not None), None)
    if first is None or not first.is_cuda or torch.cuda.current_device() == first.device.index:
        return nullcontext()
    return torch.cuda.device(first.device)
