"""Compiles every template for GPUs that are not here, and reports registers, spills and shared memory.

The host functions run on meta tensors inside `launch.recording`, so what is compiled is what would be launched: the
same switches, types, alignments and default blocks. NVIDIA's numbers come from the cubin by `cuobjdump`, which ships
with Triton; AMD's from the assembly's metadata.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from attnfx.lowering import launch, listed_samples, page_scores
from attnfx.lowering.band_launch import suited
from attnfx.lowering.bands import Arguments
from attnfx.lowering.call import Program, Residuals
from attnfx.lowering.configs import SHARED_LIMIT, Kernel, bounded, default, opened, relieved, walked
from attnfx.lowering.descriptors import type_of
from attnfx.lowering.flash import BIAS_KINDS, backward, backward_short, bias_gradient, forward
from attnfx.lowering.linear import samples as linear
from attnfx.lowering.templates import samples
from attnfx.lowering.window_gradient import window_gradient
from attnfx.sites.skipping import Skip

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
OPTIONS = ("num_warps", "num_stages")
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


#: Targets whose default configurations are measured on the hardware: there a spill is an error, elsewhere a number in the table.
SPILL_FREE = frozenset(["sm90"])


@dataclass(frozen=True)
class Row:
    """One kernel on one target. `spills` and `shared` are bytes (spills a thread), `limit` the target's shared memory;
    `allowed` is what may spill: some configurations were measured to be the fastest although they do; `error` is the compiler's
    message where it failed, and `ok` says no error, that it fits, and on the targets of SPILL_FREE that no more spills."""

    template: str
    program: str
    dtype: str
    head_dim: int
    target: str
    registers: int
    spills: int
    shared: int
    limit: int
    allowed: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        spilled = self.spills > self.allowed and self.target in SPILL_FREE
        return not self.error and not spilled and self.shared <= self.limit


@dataclass(frozen=True)
class Job:
    """A sample program (a key of PROGRAMS) at one dtype and head dimension for one target, and the kernels to take."""

    program: str
    dtype: torch.dtype
    head_dim: int
    target: str
    kernels: tuple[str, ...] = ("forward", "query_gradient", "key_gradient")


DENSE = Program(samples.plain, samples.plain_grad, None, None, None, -math.inf, False, False, slope=0.25, pure=True)
CAUSAL = replace(DENSE, keep=samples.causal, kv_range=samples.causal_keys, q_range=samples.causal_rows)
WINDOW = replace(DENSE, keep=samples.window, kv_range=samples.window_keys, q_range=samples.window_rows)
EXACT = Program(
    samples.relative_bias, samples.plain_grad, samples.causal, samples.causal_keys, samples.causal_rows,
    torch.finfo(torch.float32).min, True, True, slope=0.25,
)  # fmt: skip
WEIGHTED = replace(EXACT, weight=samples.relative_gate)
PROGRAMS = {
    "dense": DENSE,
    "causal": CAUSAL,
    "window": WINDOW,
    "bias, finfo.min added": EXACT,
    "bias, finfo.min added, weight": WEIGHTED,
}
#: Causal attention that leaves out tiles by their scores, in prefill and, of a step, in runs of keys.
SKIPPING = {
    "causal, tiles left out": replace(CAUSAL, skip=Skip(1e-3, None, 64, 64)),
    "causal, step, tiles left out": replace(CAUSAL, skip=Skip(1e-3, None, 64, 64, 1024)),
}
#: Causal attention with a second product, of rows of its own.
BANDED = "causal, second product"
#: The program of causal attention inside of documents, whose kernels walk lists of tiles, and the kernels that make the lists.
LISTED = "causal, documents, by lists"
#: A neighbourhood in an image, whose tiles are boxes of it.
BOXES = "boxes of an image, by lists"
#: Pages of 16 keys, scored.
PAGES = "pages of a cache"
BY_LISTS = {LISTED: listed_samples.documents, BOXES: listed_samples.image}
LISTS = ("profile_ends", "tile_lists")
#: The kernels for few queries and keys; the literal ones are for rows that keep nothing, and may spill.
SHORT = ("short_forward", "short_forward, literal", "short_backward", "short_backward, literal")


def check(
    targets: Sequence[str] = TARGETS,
    jobs: Sequence[Job] | None = None,
    processes: int = 2,
    begun: Callable[[str], None] = lambda target: None,
) -> list[Row]:
    """A row for every kernel of `jobs` (default: `representative`) on `targets`; ValueError names an unknown target.

    `begun` is told each target when all rows of those before it are there.
    """
    for target in targets:
        if target not in SHARED_LIMIT:
            raise ValueError(f"the target is {target!r}; supported: {', '.join(SHARED_LIMIT)}")
    chosen = list(jobs) if jobs is not None else list(itertools.chain.from_iterable(map(representative, targets)))
    if processes <= 1:
        return _in_order(chosen, map(compile_job, chosen), begun)
    # forked workers would inherit threads and CUDA
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return _in_order(chosen, pool.map(compile_job, chosen), begun)


def _in_order(jobs: Sequence[Job], found: Iterator[list[Row]], begun: Callable[[str], None]) -> list[Row]:
    rows, current = list[Row](), ""
    for job in jobs:
        if job.target != current:
            current = job.target
            begun(current)
        rows += next(found)
    return rows


def representative(target: str) -> Iterator[Job]:
    """Every template, both half precisions and float32, narrow to wide heads, without and with masks and exact rows."""
    bf16, biases = torch.bfloat16, ("delta", *BIAS_KINDS)
    for head_dim in (32, 64, 128, 256):
        yield Job("dense", bf16, head_dim, target)
        yield Job("causal", bf16, head_dim, target)
        yield Job("window", bf16, head_dim, target)
        yield Job("bias, finfo.min added", bf16, head_dim, target)
        yield Job("bias, finfo.min added", bf16, head_dim, target, biases)
    yield Job("bias, finfo.min added, weight", bf16, 128, target)
    for program in ("dense", "bias, finfo.min added"):
        for head_dim in (32, 64):
            yield Job(program, bf16, head_dim, target, SHORT)
    yield Job("bias, finfo.min added", torch.float32, 32, target, SHORT)
    yield Job("causal", torch.float16, 80, target)
    for head_dim in (64, 128):
        yield Job(BANDED, bf16, head_dim, target, ("forward", "query_gradient", "key_gradient", "window_gradient"))
    yield Job(BANDED, torch.float32, 64, target, ("forward", "query_gradient", "key_gradient", "window_gradient"))
    for head_dim in (64, 128):
        yield Job(LISTED, bf16, head_dim, target, (*LISTS, "forward", "query_gradient", "key_gradient", *BIAS_KINDS))
        yield Job(BOXES, bf16, head_dim, target, ("forward",))
    for head_dim in (64, 128, 256):
        for program, kernel in zip(SKIPPING, ("forward", "decode_partial"), strict=True):
            yield Job(program, bf16, head_dim, target, (kernel,))
    yield Job(PAGES, bf16, 128, target, ("page_scores",))
    decoding = ("decode_partial", "decode_merge")
    for dtype in (bf16, torch.float32):
        for head_dim in (64, 128, 256):
            yield Job("bias, finfo.min added", dtype, head_dim, target, decoding)
    yield Job("dense", bf16, 128, target, decoding)
    yield Job("causal", torch.float16, 80, target, decoding)
    for program, dtype, width in linear.REPRESENTATIVE:
        yield Job(program, dtype, width, target, linear.KERNELS)
    for head_dim in (64, 128, 256):
        yield Job("causal", torch.float32, head_dim, target)
        yield Job("bias, finfo.min added", torch.float32, head_dim, target, biases)


def compile_job(job: Job) -> list[Row]:
    """The rows of one job."""
    rows = []
    for name, call in _calls(job):
        place = (name, job.program, str(job.dtype).removeprefix("torch."), job.head_dim, job.target)
        limit = SHARED_LIMIT[job.target]
        try:
            rows.append(Row(*place, *_measure(call, job.target), limit, _allowed(name, job)))
        except Exception as failure:  # a template that does not compile is a row of the report, not its end
            rows.append(Row(*place, 0, 0, 0, limit, error=reason(failure)))
    return rows


def _allowed(kernel: str, job: Job) -> int:
    """Bytes that the default configuration of a kernel may spill."""
    if job.program == BANDED:
        return suited(
            "diagonal_bias" if kernel == "window_gradient" else kernel, job.dtype, job.head_dim, job.head_dim, job.target
        ).spills
    if job.program in linear.PROGRAMS:
        return linear.SPILLS.get(kernel, 0) if job.dtype == torch.bfloat16 else 0
    kernel = f"{kernel}_bias" if kernel in BIAS_KINDS else kernel
    if kernel not in get_args(Kernel):
        # the literal ones are for rare rows; float32 keeps twice as many numbers
        return 1024 if kernel.endswith("literal") else 64 if kernel in SHORT and job.dtype == torch.float32 else 0
    width = job.head_dim
    usual = default(cast(Kernel, kernel), job.dtype, width, width, job.target)
    program = PROGRAMS.get(job.program)  # lists of tiles have programs of their own, masked ones
    if kernel == "forward" and program is not None and program.open and job.dtype != torch.float32:
        usual = opened(usual, width, width, job.target, program.loaded)
    if kernel == "forward" and program is not None and program.bounded and job.dtype != torch.float32:
        usual = bounded(usual, width, width, job.target)
    if kernel == "forward" and job.program in BY_LISTS:
        usual = walked(usual, width, width, job.target)
    return usual.spills if program is None or program.weight is None else relieved(usual).spills


def reason(failure: BaseException) -> str:
    """The innermost cause: Triton wraps an error once for every function it was inlined into."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {failure}"[:2000]


def _calls(job: Job) -> Iterator[tuple[str, launch.Call]]:
    """(kernel, launch) for what the host functions would launch at an ordinary size."""
    if job.program in linear.PROGRAMS:
        yield from ((n, call) for n, call in linear.calls(job.program, job.dtype, job.head_dim, job.target) if n in job.kernels)
        return
    batch, heads, key_heads, length = 2, 8, 4, listed_samples.LENGTH
    if job.program == PAGES:
        k = torch.empty(batch, key_heads, length, job.head_dim, dtype=job.dtype, device="meta")
        with launch.recording(job.target) as recording:
            page_scores.launched(k, k.new_empty(batch, key_heads, 1, job.head_dim, dtype=torch.float32), 16)
        yield "page_scores", recording.calls[0]
        return
    q = torch.empty(batch, heads, length, job.head_dim, dtype=job.dtype, device="meta")
    k = torch.empty(batch, key_heads, length, job.head_dim, dtype=job.dtype, device="meta")
    loads = [torch.empty(heads, 2 * length - 1, device="meta")]
    ints = [2 * length - 1, length - 1, 0]
    stats = q.new_empty(q.shape[:3], dtype=torch.float32)
    residuals = Residuals(stats, stats, stats, stats[..., 0].int())
    with launch.recording(job.target) as recording:
        rows, keys = None, None
        if job.program in BY_LISTS:
            site = BY_LISTS[job.program](batch, heads)
            loads = [torch.empty([int(n) for n in t.shape], dtype=t.dtype, device="meta") for t in site.side]
            program, ints, rows, keys = listed_samples.lowered(site, loads)
        else:
            program = CAUSAL if job.program == BANDED else (PROGRAMS | SKIPPING)[job.program]
        band = _band(q) if job.program == BANDED else None
        forward(program, q, k, k, loads, ints, blocks=rows, band=band)
        forward(program, q[:, :, :1], k, k, loads, ints)
        few = q[:, :, :49]
        forward(program, few, few, few, loads, ints)
        backward_short(program, few, few, few, few, residuals, few, loads, ints, inside=False)
        left = None if band is None else torch.empty_like(q)
        backward(
            program, q, k, k, q, residuals, q, loads, ints, row_blocks=rows, key_blocks=keys, band=band, grad_left=left,
        )  # fmt: skip
        if band is not None:
            window_gradient(program, q, k, k, q, residuals, q, loads, ints, band, batch_broadcast=True, head_broadcast=True)
        for kind in BIAS_KINDS if "tile" in job.kernels else ():
            bias_gradient(program, q, k, k, q, residuals, q, loads, ints, kind=kind, batch_broadcast=True,
                          head_broadcast=False, blocks=rows)  # fmt: skip
    seen = set()
    for call in recording.calls:
        name = call.keywords.get("KIND") or call.kernel.__name__.removeprefix("flash_")
        name += ", literal" if call.keywords.get("LITERAL") else ""
        if name in job.kernels and name not in seen:
            seen.add(name)
            yield name, call


def _band(q: torch.Tensor) -> Arguments:
    """The arguments of a band of rows like ``q`` (B,H,S,D), whose window all batches and heads share."""
    window = q.new_empty(1, 1, 2 * q.shape[2] - 1, q.shape[3])
    return q, window, (0, 0, *window.stride()[2:]), 1.0


def _measure(call: launch.Call, target: str) -> tuple[int, int, int]:
    """(registers a thread, spilled bytes a thread, shared bytes a block) of one launch compiled for `target`."""
    made = compiled(call, target)
    return *usage(made, target), made.metadata.shared


def compiled(call: launch.Call, target: str) -> Any:
    """What Triton makes of one launch for `target`."""
    nvidia = target.startswith("sm")
    gpu = GPUTarget("cuda", int(target[2:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {name: call.keywords[name] for name in OPTIONS if name in call.keywords}
    with launch.compiling_for(gpu.backend):
        return triton.compile(source_of(call), target=gpu, options=options)


def usage(compiled: Any, target: str) -> tuple[int, int]:
    """(registers a thread, spilled bytes a thread) of what Triton compiled for `target`."""
    return _cubin_usage(compiled.asm["cubin"]) if target.startswith("sm") else _amd_usage(compiled.asm["amdgcn"])


def source_of(call: launch.Call) -> ASTSource:
    """What Triton would compile for a launch: its types, its constants, and 16-byte alignment where it would see it."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = dict(zip(call.kernel.arg_names, call.arguments, strict=False)) | call.keywords
    for index, parameter in enumerate(call.kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[index,] = value
        else:
            specialise = not parameter.do_not_specialize
            signature[parameter.name] = _type_of(value, (index,), specialise, constants, attributes)
    return ASTSource(call.kernel, signature, constants, attributes)


def _type_of(
    value: Any,
    path: tuple[int, ...],
    specialise: bool,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], list[list[Any]]],
) -> Any:
    """The type of one argument, as Triton's binder would find it; fills in constants and alignments on the way."""
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(_type_of(v, (*path, k), specialise, constants, attributes) for k, v in enumerate(value))
    if isinstance(value, TensorDescriptor):
        return type_of(value)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTER[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if specialise and value == 1:
        constants[path] = 1
        return "constexpr"
    if specialise and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory: what a spill is written to) of the only function of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: max(map(int, re.findall(rf"{name}:(\d+)", text)), default=0) for name in ("REG", "STACK", "LOCAL")}
    return found["REG"], max(found["STACK"], found["LOCAL"])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of spills) from the metadata at the end of AMD assembly; 4 bytes a register."""
    found = {name: int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1]) for name in ("vgpr_count", "vgpr_spill_count")}
    return found["vgpr_count"], 4 * found["vgpr_spill_count"]
