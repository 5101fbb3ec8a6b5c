"""A guard on what was read of a buffer: it fails as soon as the buffer is something else, and Dynamo compiles anew.

Dynamo skips the guards of a module whose dictionaries did not change, and a tensor written in place changes no dictionary. So
the guard does not stand with the tensor's own but among those that are checked at every call, after all others.
A check compares the tensor's version counter and memory with those last seen, and reads the tensor again only where they differ.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext, Guard, Source, TracingContext
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from attnfx.graphs.structure import fit

#: A buffer that has had more structures than this in one frame is data from then on.
MOST_STRUCTURES = 4
#: So is one that was written or replaced, with the same values, more often than this: reading it again each time is too slow.
MOST_READINGS = 32


@dataclass
class History:
    """What one buffer of one frame has been so far."""

    structures: list[object] = field(default_factory=list)
    readings: int = 0

    @property
    def restless(self) -> bool:
        return len(self.structures) > MOST_STRUCTURES or self.readings > MOST_READINGS


#: By frame and by the buffer's source.
_histories: dict[Any, dict[str, History]] = {}


def history(source: Source, what: str = "structure") -> History:
    """The history of what was read of a buffer in the frame that is being compiled."""
    compiling = CompileContext.current_compile_id()
    frame = getattr(compiling, "frame_id", None)
    return _histories.setdefault(frame, {}).setdefault(f"{what} of {name_of(source)}", History())


def begin() -> None:
    """Forget the frame that is being compiled where this is its first compile."""
    compiling = CompileContext.current_compile_id()
    if getattr(compiling, "frame_compile_id", 0) == 0:
        _histories.pop(getattr(compiling, "frame_id", None), None)


def name_of(source: Source) -> str:
    """The expression that Dynamo finds a source's value with."""
    name: Any = source.name
    return str(name() if callable(name) else name)


def guardable() -> frozenset[Source]:
    """The sources that the frame being compiled already has guards for; none where nothing can be guarded."""
    context = TracingContext.try_get()
    if context is None or torch.compiler.is_exporting():
        return frozenset()
    from torch._dynamo import config, guards

    known = hasattr(guards, "_get_closure_vars") and hasattr(guards.GuardBuilder, "add_python_lambda_leaf_guard_to_root")
    if not known or getattr(config, "caching_precompile", False):  # guards on disk know no tensors
        return frozenset()
    return frozenset(guard.originating_source for guard in context.guards_context.dynamo_guards)


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was when it was read."""

    tensor: weakref.ref[Tensor]
    version: int
    pointer: int
    storage: StorageWeakRef

    @staticmethod
    def of(t: Tensor) -> _Seen:
        return _Seen(weakref.ref(t), t._version, t.data_ptr(), StorageWeakRef(t.untyped_storage()))  # type: ignore[no-untyped-call]

    def still(self, t: Tensor) -> bool:
        """Whether ``t`` is that tensor, not written since."""
        return (
            self.tensor() is t
            and self.version == t._version
            and self.pointer == t.data_ptr()
            and self.storage.cdata == t.untyped_storage()._cdata
        )


class Proof:
    """That a buffer has a structure. Called with the buffer that is there now, tells whether it has it still.

    ``read`` finds the structure of a tensor, ``readable`` says whether one may be asked for it.
    """

    def __init__(
        self,
        tensor: Tensor,
        past: History,
        read: Callable[[Tensor], object] = fit,
        readable: Callable[[object], bool] | None = None,
    ) -> None:
        self.structure: object = None
        self.past, self.read, self.readable = past, read, readable or plain
        self.seen = {id(tensor): _Seen.of(tensor)}

    def __call__(self, tensor: Tensor) -> bool:
        seen = self.seen.get(id(tensor))
        return (seen is not None and seen.still(tensor)) or self._again(tensor)

    def _again(self, tensor: Tensor) -> bool:
        if not self.readable(tensor):
            return False
        now = _Seen.of(tensor)
        living = {key: old for key, old in self.seen.items() if old.tensor() is not None}
        if id(tensor) in living or len(living) < len(self.seen):  # written or replaced, not another module's with the same code
            self.past.readings += 1
        self.seen = living
        if self.past.restless or self.read(tensor) != self.structure:
            return False
        self.seen[id(tensor)] = now
        return True


def plain(t: object) -> bool:
    """Whether a value is a plain tensor, in memory and with a version counter, that no gradient is asked of."""
    return type(t) is Tensor and not t.requires_grad and _dense(t)


def constant(t: object) -> bool:
    """Whether a value is a plain tensor or a parameter of which no gradient is asked here: the grad mode is guarded by Dynamo."""
    if type(t) not in (Tensor, Parameter):
        return False
    assert isinstance(t, Tensor)
    return _dense(t) and not (t.requires_grad and torch.is_grad_enabled())


def _dense(t: Tensor) -> bool:
    if t.is_meta or t.layout != torch.strided or t.is_inference():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(t)


def install(proofs: Iterable[tuple[Source, Proof]]) -> None:
    """Make the frame that is being compiled valid only as long as ``proofs`` hold."""
    guards = TracingContext.get().guards_context.dynamo_guards
    for source, proof in proofs:
        guards.add(Guard(source, functools.partial(buffer_unchanged, proof=proof)))


def buffer_unchanged(builder: Any, guard: Guard, proof: Proof) -> None:
    """Put ``proof`` among the guards that are checked last, with whatever tensor the frame finds under its name then."""
    from torch._dynamo import guards

    known = guards._get_closure_vars()
    name, check = name_of(guard.originating_source), f"___attnfx_unchanged_{id(proof)}"
    why = f"{name} is what it was when its values were read  # attnfx, options={{'buffers': 'ignore'}} leaves it unread"
    builder.add_python_lambda_leaf_guard_to_root([f"{check}({name})"], [why], closure_vars={**known, check: proof})
