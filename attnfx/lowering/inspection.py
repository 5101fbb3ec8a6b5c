"""What the kernels of an attention compile to for a GPU that is not here: their assembly, registers, spills and shared memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from attnfx.algebra.evaluate import integer
from attnfx.errors import AttnfxError
from attnfx.lowering import bands, blocks, codegen, crosscompile, flash, handed, kernel_gradients, launch
from attnfx.lowering.configs import SHARED_LIMIT
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.portable import Result

#: What a size is taken to be that is known only at run time and is no length of queries or keys.
FEW = 2


@dataclass(frozen=True)
class Compiled:
    """One kernel: ``assembly`` is PTX or AMDGCN, ``registers`` and ``spills`` (bytes) are those of a thread, ``shared`` bytes of a
    block, of at most ``limit``; ``constants`` are the block sizes and switches that it is compiled for."""

    name: str
    assembly: str
    registers: int
    spills: int
    shared: int
    limit: int
    grid: tuple[int, ...]
    constants: Mapping[str, Any]


def compiled(plan: KernelPlan, target: str, sample: int) -> list[Compiled]:
    """Every kernel that a call of ``plan`` launches on ``target`` (a key of `configs.SHARED_LIMIT`), backward's too where gradients
    are wanted; sizes as :func:`sizes` has them, contiguous tensors. Raises AttnfxError where one does not compile."""
    found, names = [], set[str]()
    for call in launches(plan, target, sample):
        stem = "_".join(str(part).lower() for part in (call.kernel.__name__, call.keywords.get("KIND")) if part is not None)
        name = next(n for n in (stem, *(f"{stem}_{k}" for k in range(2, 100))) if n not in names)
        names.add(name)
        try:
            made = crosscompile.compiled(call, target)
            registers, spills = crosscompile.usage(made, target)
        except Exception as failure:
            raise AttnfxError(f"{name} does not compile for {target}: {crosscompile.reason(failure)}") from failure
        assembly = made.asm["ptx" if target.startswith("sm") else "amdgcn"]
        switches = {p.name for p in call.kernel.params if p.is_constexpr} | {*crosscompile.OPTIONS}
        constants = {k: v for k, v in call.given.items() if k in switches}
        found.append(Compiled(name, assembly, registers, spills, made.metadata.shared, SHARED_LIMIT[target], call.grid, constants))
    return found


def launches(plan: KernelPlan, target: str, sample: int) -> list[launch.Call]:
    """The launches of a call, recorded on tensors without memory; each kernel once for equal types and constants."""
    at, site = sizes(plan, sample), plan.site

    def empty(dtype: torch.dtype, *shape: Any) -> Tensor:
        return torch.empty([_number(n, at) for n in shape], dtype=dtype, device="meta")

    q = empty(site.dtype, site.batch, site.heads, site.queries, site.head_dim)
    k, v = (empty(site.dtype, site.batch, site.key_heads, site.keys, width) for width in (site.head_dim, site.value_dim))
    loads = [empty(side.dtype, *side.shape) for side in site.side]
    seed = empty(torch.int64, 1) if site.dropout > 0.0 else None
    text, numbers = plan.to_json(), [at[s] for s in plan.symbols]
    values = plan.values(numbers, k.shape[2], loads)
    with launch.recording(target) as recording:
        rows, keys = _lists(text, plan, q, k, loads, values)
        tensors = handed.pointers(plan, k.shape[2], loads)
        ints, program, band = handed.ints(plan, values, tensors), codegen.program_of(text), bands.arguments(site, loads)
        out, r = flash.forward(program, q, k, v, tensors, ints, dropout_p=site.dropout, seed=seed, blocks=rows, band=band)
        if site.requires_grad:
            result = Result(out, r.lse, r.row_max, r.row_sum, r.degenerate)
            kernel_gradients.backward(plan, q, k, v, loads, numbers, seed, result, out, None, text, rows, keys)
    once: dict[Any, launch.Call] = {}
    for call in recording.calls:
        made = crosscompile.source_of(call)
        options = tuple(call.keywords.get(name) for name in crosscompile.OPTIONS)
        once.setdefault((call.kernel.__name__, str(made.signature), str(made.constants), str(made.attrs), options), call)
    return list(once.values())


def sizes(plan: KernelPlan, sample: int) -> dict[sympy.Symbol, int]:
    """What every size symbol of a plan is taken to be: ``sample`` where queries or keys depend on it, else FEW, within the range
    that is known of it."""
    site = plan.site
    lengths = sympy.sympify(site.queries).free_symbols | sympy.sympify(site.keys).free_symbols
    other = (site.batch, site.heads, site.key_heads, *(n for side in site.side for n in side.shape), *plan.symbols)
    known = set().union(lengths, *(sympy.sympify(n).free_symbols for n in other))
    ranges, chosen = site.ranges, {}
    for symbol in sorted(known, key=str):
        low, high = (None if n is None else _constant(n) for n in (ranges.low.get(symbol), ranges.high.get(symbol)))
        wanted = sample if symbol in lengths else FEW
        wanted = wanted if high is None else min(wanted, high)
        chosen[symbol] = wanted if low is None else max(wanted, low)
    return chosen


def _constant(n: Any) -> int | None:
    found = sympy.sympify(n)
    return int(found) if found.is_Integer else None


def _number(n: Any, at: Mapping[sympy.Symbol, int]) -> int:
    found = int(integer(sympy.sympify(n), at))
    if found < 1:
        sizes = ", ".join(f"{symbol} = {value}" for symbol, value in at.items())
        raise AttnfxError(f"A size of this attention, {n}, is {found} with {sizes}: choose another sample size.")
    return found


def _lists(
    text: str, plan: KernelPlan, q: Tensor, k: Tensor, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int]
) -> tuple[Tensor | None, Tensor | None]:
    """The lists of tiles that the kernels walk, by rows and where gradients are wanted by keys; what makes them is recorded too."""
    queries, keys = q.shape[2], k.shape[2]
    mask = blocks.mask_of(text) if blocks.worthwhile(queries, keys) else None
    if mask is None:
        return None, None
    given = [loads[s] for s in mask.slots]
    batch, heads = q.shape[0] if mask.per_batch else 1, q.shape[1] if mask.per_head else 1
    numbers = [values[s] for s in KernelPlan.from_json(mask.text).symbols]

    def lists(by_keys: bool) -> Tensor:
        return blocks.build(given, numbers, batch, heads, queries, keys, by_keys, q.device, mask.text)

    return lists(False), lists(True) if plan.site.requires_grad else None
