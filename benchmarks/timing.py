"""Time and memory of one call: by events on a GPU, by the clock on a CPU; always the median, never the best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnfx.testing import peak_bytes

REPETITIONS = 5  # at least; more of them where a call is so short that they fit into MILLISECONDS
MILLISECONDS = 300
SHORT = 1.0  # milliseconds; calls below are compared by their CUDA graphs


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


def median_ms(call: Callable[[], object], device: str, milliseconds: float = MILLISECONDS) -> float:
    """Milliseconds of one call, median; on a GPU with a cold L2 cache (`triton.testing.do_bench`)."""
    once = 1000 * seconds(call, device)
    span = max(milliseconds, REPETITIONS * once)
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=int(1.1 * span), return_mode="median"))
    return statistics.median(1000 * seconds(call, device) for _ in range(min(30, int(span / max(once, 1e-3)))))


def graph_ms(call: Callable[[], object], device: str, milliseconds: float = MILLISECONDS) -> float | None:
    """As :func:`median_ms`, of the call's CUDA graph: the device's time without what launching costs. None on a CPU, and where
    the call cannot be captured."""
    if torch.device(device).type != "cuda":
        return None
    try:
        replay = captured(call)
    except Exception:  # of whatever kind: there is no such time
        torch.cuda.synchronize()
        return None
    return median_ms(replay, device, milliseconds)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call, as a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ratio(result: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    """How many times as long a result took as ours, both with `ms` and `graph_ms`: by the graphs' times where either is so short
    that launching shows, and both have one."""
    graphs = result.get("graph_ms"), ours.get("graph_ms")
    if min(result["ms"], ours["ms"]) < SHORT and None not in graphs:
        return float(graphs[0] / graphs[1])  # type: ignore[operator]
    return float(result["ms"] / ours["ms"])


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
