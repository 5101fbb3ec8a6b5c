"""Time and memory of one call: by events on a GPU, by the clock on a CPU; always the median, never the best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from attnfx.testing import peak_bytes

REPETITIONS = 5  # at least; more of them where a call is so short that they fit into MILLISECONDS
MILLISECONDS = 300


def synchronize(device: str) -> None:
    """Wait until the device has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call, the device's work included: for first calls, where compiling dominates."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_ms(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, median; on a GPU with a cold L2 cache (`triton.testing.do_bench`)."""
    once = 1000 * seconds(call, device)
    span = max(MILLISECONDS, REPETITIONS * once)
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=int(1.1 * span), return_mode="median"))
    return statistics.median(1000 * seconds(call, device) for _ in range(min(30, int(span / max(once, 1e-3)))))


def peak_gb(call: Callable[[], object], device: str) -> float:
    """GiB allocated at the highest moment of one call: with the weights on a GPU, above them on a CPU."""
    if torch.device(device).type == "cuda":
        return (torch.cuda.memory_allocated() + peak_bytes(call, device)) / 2**30
    return peak_bytes(call, device) / 2**30


def release(device: str) -> None:
    """Forget compiled code and give cached memory back, so that one peer's leftovers are not the next one's peak."""
    torch._dynamo.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
