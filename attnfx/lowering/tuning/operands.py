"""The tensors of one call of an operator, and what the search does with them: run a kernel, time it, or compile it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, cast, get_args

import torch
from torch import Tensor

from attnfx.lowering import bands, codegen, flash, handed, launch
from attnfx.lowering.call import Program, Residuals
from attnfx.lowering.configs import Choice, Config, Kernel, Tile
from attnfx.lowering.gradients import BiasGradient
from attnfx.lowering.launch import Call
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.tuning import lookup
from attnfx.lowering.tuning.shapes import Shape

_NAMES = {
    "flash_forward": "forward", "decode_partial": "decode", "flash_query_gradient": "query_gradient",
    "flash_key_gradient": "key_gradient",
}  # fmt: skip
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64,
)}  # fmt: skip


class _Besides(TypedDict):
    dropout_p: float
    seed: Tensor | None
    band: bands.Arguments | None


@dataclass(frozen=True)
class Operands:
    """What `attnfx::flash` was called with, or `attnfx::flash_backward`, which has the fields from ``out`` on too; ``text`` is the
    plan's JSON, ``loads`` are the caller's side tensors and the plan's tables."""

    text: str
    q: Tensor
    k: Tensor
    v: Tensor
    loads: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    seed: Tensor | None = None
    row_blocks: Tensor | None = None
    key_blocks: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    row_max: Tensor | None = None
    row_sum: Tensor | None = None
    degenerate: Tensor | None = None
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None

    @property
    def plan(self) -> KernelPlan:
        return KernelPlan.from_json(self.text)

    @property
    def program(self) -> Program:
        return codegen.program_of(self.text)

    def shape(self, kernel: str) -> Shape:
        """The sizes under which a kernel's entry is remembered."""
        blocks = self.key_blocks if kernel == "key_gradient" else self.row_blocks
        lists = blocks is not None and kernel != "decode"
        return Shape.of(self.q, self.k, self.v, lists, self.plan.site.dropout > 0.0)

    def key(self, kernel: str) -> str:
        return self.shape(kernel).key(self.program.key, kernel)

    def kernels(self, target: str) -> dict[str, Choice]:
        """The kernels that such a call launches and a configuration chooses for, and what each runs with by default."""
        found: dict[str, Choice] = {}
        with lookup.forced({}):
            for call in self._calls(target, None):
                if (kernel := _kernel_of(call)) is not None:
                    found.setdefault(kernel, _choice_of(call))
        return found

    def run(self, kernel: str, choice: Choice) -> tuple[Tensor, ...]:
        """What the call gives with a configuration for one kernel: everything that this kernel has a part in."""
        with lookup.forced({kernel: choice}):
            results = self._results(kernel)
        return {"query_gradient": results[:1], "key_gradient": results[1:3]}.get(kernel, results)

    def launcher(self, kernel: str, choice: Choice, target: str) -> Callable[[], None]:
        """What launches the kernel alone; what it reads has been computed."""
        before, chosen = self.calls(kernel, choice, target)
        for call in before:
            call.make()

        def again() -> None:
            for call in chosen:
                call.make()

        return again

    def calls(self, kernel: str, choice: Choice, target: str) -> tuple[list[Call], list[Call]]:
        """The launches that come before a kernel's, and the kernel's own: the split-KV kernels are two."""
        with lookup.forced({kernel: choice}):
            made = self._calls(target, kernel)
        own = [n for n, call in enumerate(made) if _kernel_of(call) == kernel]
        if not own:
            raise ValueError(f"no kernel {kernel!r} among the launches of such a call")
        first = own[0]
        last = len(made) if kernel == "decode" else first + 1
        return [call for call in made[:first] if _kernel_of(call) is None], made[first:last]

    def results(self) -> tuple[Tensor, ...]:
        """What the call gives."""
        return self._results(None)

    def following(self, grad_out: Tensor) -> Operands:
        """The call of `attnfx::flash_backward` after this one."""
        out, r = self._forward()
        return replace(self, out=out, lse=r.lse, row_max=r.row_max, row_sum=r.row_sum, degenerate=r.degenerate, grad_out=grad_out)

    def _calls(self, target: str, kernel: str | None) -> list[Call]:
        with launch.recording(target) as recorded:
            self._results(kernel)
        return recorded.calls

    def _results(self, kernel: str | None) -> tuple[Tensor, ...]:
        """The results that a kernel has a part in, by way of the host functions that every call takes; of all kernels for None."""
        if self.grad_out is None:
            out, residuals = self._forward()
            return out, residuals.lse
        saved = (self.out, self.lse, self.row_max, self.row_sum, self.degenerate)
        assert all(t is not None for t in saved)
        out, *rest = cast(tuple[Tensor, ...], saved)
        plan, besides = self.plan, self._besides
        given: tuple[Any, ...] = (
            self.program, self.q, self.k, self.v, out, Residuals(*rest), self.grad_out, *self._side,
        )  # fmt: skip
        results: tuple[Tensor, ...] = ()
        if kernel in (None, "query_gradient", "key_gradient"):
            results = flash.backward(
                *given,
                grad_lse=self.grad_lse,
                row_blocks=self.row_blocks,
                key_blocks=self.key_blocks,
                grad_left=self._left,
                **besides,
            )
        for g in plan.gradients:
            if g.kind in flash.BIAS_KINDS and kernel in (None, f"{g.kind}_bias"):
                results = (*results, self._bias(g, given, besides))
        return results

    def _forward(self) -> tuple[Tensor, Residuals]:
        return flash.forward(self.program, self.q, self.k, self.v, *self._side, blocks=self.row_blocks, **self._besides)

    @property
    def _side(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The side tensors and the numbers that the kernels take."""
        plan = self.plan
        values = plan.values(self.sizes, self.k.shape[2], self.loads)
        tensors = handed.pointers(plan, self.k.shape[2], self.loads)
        return tensors, handed.ints(plan, values, tensors)

    @property
    def _besides(self) -> _Besides:
        site = self.plan.site
        return _Besides(dropout_p=site.dropout, seed=self.seed, band=bands.arguments(site, self.loads))

    @property
    def _left(self) -> Tensor | None:
        """Room for the gradient of a band's rows that are not the queries."""
        band = bands.arguments(self.plan.site, self.loads)
        return None if band is None or band[0] is None else self.q.new_empty(self.q.shape)

    def _bias(self, g: BiasGradient, given: Sequence[Any], besides: _Besides) -> Tensor:
        kind = cast(flash.BiasKind, g.kind)
        return flash.bias_gradient(
            *given, kind=kind, batch_broadcast=g.batch_broadcast, head_broadcast=g.head_broadcast, inside=g.inside,
            grad_lse=self.grad_lse, blocks=self.row_blocks, **besides,
        )  # fmt: skip

    def to_data(self) -> dict[str, Any]:
        """Everything but the numbers in the tensors, as JSON: what a kernel is compiled from."""
        made: dict[str, Any] = {"text": self.text, "sizes": list(self.sizes), "loads": [_tensor_data(t) for t in self.loads]}
        optional = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in made}
        return made | {name: None if t is None else _tensor_data(t) for name, t in optional.items()}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Operands:
        """The call that ``to_data`` wrote, of meta tensors."""
        given = {name: None if t is None else _meta(t) for name, t in data.items() if name not in ("text", "sizes", "loads")}
        loads, sizes = tuple(_meta(t) for t in data["loads"]), tuple(data["sizes"])
        return Operands(text=data["text"], sizes=sizes, loads=loads, **cast(dict[str, Any], given))


def _kernel_of(call: Call) -> str | None:
    """The kernel of a launch, as configurations are named for; None for one that has no configuration of its own."""
    name = call.kernel.__name__
    if name == "flash_bias_gradient":
        name = f"{call.keywords['KIND']}_bias"
        return name if name in get_args(Kernel) else None
    return _NAMES.get(name)


def _choice_of(call: Call) -> Choice:
    """The configuration that a launch was recorded with."""
    given = call.given
    n, warps, stages = given["BLOCK_N"], given["num_warps"], given["num_stages"]
    if "splits" in given:
        return Tile(n, warps, stages, given["splits"])
    return Config(given["BLOCK_M"], n, warps, stages, bool(given.get("TMA", False)))


def _tensor_data(t: Tensor) -> list[Any]:
    return [list(t.shape), list(t.stride()), str(t.dtype).removeprefix("torch.")]


def _meta(data: Sequence[Any]) -> Tensor:
    shape, strides, dtype = data
    return torch.empty_strided(shape, strides, dtype=_DTYPES[dtype], device="meta")
