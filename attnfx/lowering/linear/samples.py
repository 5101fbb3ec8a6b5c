"""Sample calls of linear attention, to be compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnfx.lowering import launch
from attnfx.lowering.linear import kernels

#: Programs by name: whether they are causal with a decay, and whether they are normalised.
PROGRAMS = {"linear, decay": (True, False), "linear, normalised": (True, True), "linear, full": (False, True)}
#: The kernels of forward and backward.
KERNELS = ("states", "states, back", "scan", "scan, back", "output", "query", "key", "value")
#: Bytes that the walks may spill: with smaller states, which spill nothing, they read and multiply half as much again.
SPILLS = {"output": 128, "query": 16, "key": 16, "value": 16}
#: Program, dtype, and width of the features: heads, and second-order Taylor features of heads of 16 and 64.
REPRESENTATIVE = (
    ("linear, decay", torch.bfloat16, 64), ("linear, decay", torch.bfloat16, 128),
    ("linear, normalised", torch.bfloat16, 128), ("linear, full", torch.bfloat16, 64),
    ("linear, normalised", torch.bfloat16, 176), ("linear, normalised", torch.bfloat16, 2192),
    ("linear, decay", torch.float16, 128),
    ("linear, normalised", torch.float32, 64), ("linear, full", torch.float32, 176),
)  # fmt: skip


def calls(program: str, dtype: torch.dtype, width: int, target: str) -> Iterator[tuple[str, launch.Call]]:
    """(kernel, launch) of each kernel at an ordinary length; ``width`` is that of the features, values have at most 128."""
    (causal, normalize), heads, length = PROGRAMS[program], 8, 4096
    q = torch.empty(2, heads, length, width, dtype=dtype, device="meta")
    k = torch.empty(2, heads // 2, length, width, dtype=dtype, device="meta")
    v = torch.empty(2, heads // 2, length, min(width, 128), dtype=dtype, device="meta")
    decay = None if normalize else torch.empty(heads, device="meta")
    with launch.recording(target) as recording:
        made = kernels.forward(q, k, v, decay, None, None, causal, normalize, 0.0)
        kernels.backward(q, k, v, decay, None, None, made.out, made.sums, made.out, None, None, None, causal, normalize, 0.0)
    seen = set()
    for call in recording.calls:
        name = call.keywords.get("MODE") or call.kernel.__name__.removeprefix("linear_")
        name = f"{name}, back" if call.keywords.get("BACK") else name
        if call.kernel.__name__.startswith("linear_") and name not in seen:
            seen.add(name)
            yield name, call
