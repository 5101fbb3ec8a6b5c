"""A process that compiles kernels and has no GPU: ``python -m attnfx.lowering.tuning.worker``.

It reads one job a line from standard input and answers with one line. A kernel is compiled by Triton's own way to a launch, with a
driver that only knows the target, so that the process that launches it finds it in Triton's cache on disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from attnfx.lowering import crosscompile
from attnfx.lowering.tuning.entries import choice_from_data
from attnfx.lowering.tuning.operands import Operands


@dataclass(frozen=True)
class Driver:
    """As much of a Triton driver as compiling asks for."""

    target: GPUTarget

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compiled(job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a job: what the kernels of a call need in one configuration, or the compiler's error.

    A job has "operands" (`Operands.to_data`), "kernel", "config", "target" (its name, and what a GPUTarget is made of), and
    "cache", the folder of Triton's cache.
    """
    start, (name, *target) = time.perf_counter(), job["target"]
    os.environ["TRITON_CACHE_DIR"] = job["cache"]
    triton.runtime.driver.set_active(Driver(GPUTarget(*target)))
    try:
        _, calls = Operands.from_data(job["operands"]).calls(job["kernel"], choice_from_data(job["config"]), name)
        made = [call.kernel.run(*call.arguments, grid=call.grid, warmup=True, **call.keywords) for call in calls]
        registers, spills = crosscompile.usage(made[0], name)
        found: dict[str, Any] = {"shared": max(m.metadata.shared for m in made), "registers": registers, "spills": spills}
        found["hashes"] = [m.hash for m in made]
    except Exception as error:  # a configuration that does not compile is an answer
        found = {"error": crosscompile.reason(error)}
    return found | {"seconds": time.perf_counter() - start}


def main() -> None:
    """Answer job after job until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints while compiling does not print between answers
    for line in sys.stdin:
        print(json.dumps(compiled(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
