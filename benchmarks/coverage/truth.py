"""Ground truth: how many attentions one eager forward runs, counted from what flows into what.

A *score* is a product of two activations (a product with a weight is a linear map). A softmax of a score, built in or written out
with exp, gives *probabilities*. An attention is a softmax whose probabilities become a factor of a product with an activation, or a
call of scaled_dot_product_attention. Marks follow storages, which views share, through every ATen operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.coverage.registry import Built

_PRODUCTS = {"bmm", "mm", "addmm", "baddbmm", "mv", "dot"}
_CONVOLUTIONS = {"convolution", "_convolution", "conv1d", "conv2d", "conv3d"}
_SOFTMAXES = {"_softmax", "_safe_softmax", "softmax"}
#: What comes out of these is no score and no probability any more.
_ENDS = {
    "amax", "amin", "max", "min", "argmax", "argmin", "mean", "logsumexp", "norm", "linalg_vector_norm", "var", "var_mean",
    "embedding", "any", "all", "rsqrt",
}  # fmt: skip
#: A score survives this many linear maps (talking heads), so that the queries of the next layer are none.
_MAPS = 1


@dataclass(frozen=True)
class Marks:
    """What a tensor is made of: ``weight`` of parameters alone, ``score`` or ``softmaxes`` of attention, ``maps`` passed since."""

    weight: bool = False
    score: bool = False
    softmaxes: frozenset[int] = frozenset()
    maps: int = 0


@dataclass(frozen=True)
class Truth:
    """Attentions of one forward: calls of the fused operator, and those written out."""

    fused: int
    written_out: int

    @property
    def sites(self) -> int:
        return self.fused + self.written_out


def count(built: Built) -> Truth:
    """The attentions that one forward of a model runs."""
    model, args, kwargs = built
    marks = _Marker(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its attention is hidden in one operation, which tracing takes apart
    try:
        with torch.no_grad(), _Calls(marks), marks:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Truth(marks.fused, len(marks.contracted))


class _Calls(TorchFunctionMode):
    """Counts calls of scaled_dot_product_attention, and hides what they are made of.

    A mode does not see what torch's own functions call, so the function is wrapped in their modules as well.
    """

    def __init__(self, marks: _Marker) -> None:
        super().__init__()
        self.marks = marks

    def __enter__(self) -> _Calls:
        F.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention = self.counted
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *failure: Any) -> None:
        F.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention = _SDPA
        super().__exit__(*failure)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.counted if func is _SDPA else func)(*args, **(kwargs or {}))

    def counted(self, *args: Any, **kwargs: Any) -> Any:
        if self.marks.hidden:
            return _SDPA(*args, **kwargs)
        self.marks.fused += 1
        self.marks.hidden = True
        try:
            return _SDPA(*args, **kwargs)
        finally:
            self.marks.hidden = False


_SDPA = F.scaled_dot_product_attention


class _Marker(TorchDispatchMode):
    """Follows marks through a forward; ``contracted`` holds the softmaxes that turned out to be attentions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.known: dict[int, Marks] = {}
        self.alive: list[Tensor] = []  # the address of a storage that is freed would come back as another's
        self.fused, self.softmaxes = 0, 0
        self.hidden = False
        self.contracted: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self.mark(tensor, Marks(weight=True))

    def mark(self, tensor: Tensor, marks: Marks) -> None:
        self.alive.append(tensor)
        self.known[_address(tensor)] = marks

    def of(self, tensor: Tensor) -> Marks:
        return self.known.get(_address(tensor), Marks())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        name = str(getattr(func, "_overloadpacket", func)).rpartition(".")[2]
        found = Marks() if self.hidden else self.result(name, given, made)
        addresses = {_address(t) for t in given}
        for tensor in made:
            if _address(tensor) not in addresses:
                self.mark(tensor, found)
            elif name.endswith("_"):  # written in place: what it was and what came in
                old = self.of(tensor)
                self.mark(tensor, replace(found, weight=old.weight and found.weight, softmaxes=old.softmaxes | found.softmaxes))
        return result

    def result(self, name: str, given: list[Tensor], made: list[Tensor]) -> Marks:
        """The marks of what an operation computes."""
        marks = [self.of(t) for t in given]
        if name in _PRODUCTS:
            return self.product(*marks[-2:])
        if name in _CONVOLUTIONS:
            return self.product(marks[0], Marks(weight=True))
        merged = self.merged(given, marks)
        if name in _SOFTMAXES or (name == "exp" and merged.score):
            if not merged.score:
                return Marks()
            self.softmaxes += 1
            return Marks(softmaxes=frozenset([self.softmaxes]))
        if name in _ENDS or (name == "sum" and merged.softmaxes):
            return Marks(weight=merged.weight)
        outer = name == "mul" and len(marks) == 2 and made[0].numel() > max(t.numel() for t in given)
        if outer and not any(m.weight or m.score or m.softmaxes for m in marks):
            return Marks(score=True, maps=_MAPS)  # a sum will contract it: queries times keys
        return merged

    def merged(self, given: list[Tensor], marks: list[Marks]) -> Marks:
        floating = [m for t, m in zip(given, marks, strict=True) if t.is_floating_point()]
        softmaxes = frozenset[int]().union(*(m.softmaxes for m in floating))
        score = not softmaxes and any(m.score for m in floating)
        return Marks(all(m.weight for m in marks), score, softmaxes, max((m.maps for m in floating), default=0))

    def product(self, left: Marks, right: Marks) -> Marks:
        if left.weight or right.weight:
            mapped = right if left.weight else left
            kept = mapped.maps < _MAPS and not mapped.weight
            return replace(mapped, weight=False, maps=mapped.maps + 1) if kept else Marks(weight=left.weight and right.weight)
        softmaxes = left.softmaxes | right.softmaxes
        self.contracted |= softmaxes
        return Marks(score=not softmaxes)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)
