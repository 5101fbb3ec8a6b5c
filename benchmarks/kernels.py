"""The kernels themselves: attnfx's, torch's own, FlexAttention's and Inductor's on one attention, side by side, in one run.

    python -m benchmarks.kernels [--quick] [--rows GLOB] [--peers GLOBS] [--plots] [--jobs N] [--out FILE]
        [--device cuda|cpu]

Attention alone, bf16, forward and forward with backward. "generated": attnfx's kernel for the formula; "chosen":
`torch.compile(eager, backend="attnfx")`, which takes torch's own kernel where that is fastest; "cudnn", "flash" and "efficient":
scaled_dot_product_attention by backend, with a dense mask where it has no flag for the mask; "flex": FlexAttention; "compiled":
torch.compile on the eager spelling; "fla": flash-linear-attention, where it is installed.

Output and gradients are checked before anything is timed: relative L2 distance from float32, or float64 where that is quick. `ms`:
CUDA events with a cold L2 cache, median; `graph ms`: the same step as a CUDA graph, the device's time without launches; peers
are compared by it where either takes less than 1 ms. `first s`: building the peer and its first call, in a
process that may have compiled the like before; with `--jobs`, as processes took that compiled side by side beforehand.
`setup ms`: what all layers of a model share, such as FlexAttention's block mask; `a layer`: one call and a 32nd of that, by which
such rows are compared. `of peak`: of the device's dense bf16 rate. A peer that fails is a row of data with the error in it.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnfx.testing import peak_bytes
from benchmarks import command, kernel_plots, timing
from benchmarks.command import Result
from benchmarks.kernel_ahead import first_calls
from benchmarks.kernel_peers import NAMES, OURS, Made, Make, peers
from benchmarks.kernel_rows import ROWS, Row, quick
from benchmarks.kernel_table import table
from benchmarks.kernel_truth import Truth, pushed, truth
from benchmarks.roofline import peak_tflops

MILLISECONDS = 100  # spent on one time, where a call is short
LAYERS = 32


def run(row: Row, device: str, names: list[str] | None = None) -> Iterator[Result]:
    """All peers of one row, or those whose names match one of ``names``."""
    inputs = row.inputs(device)
    right = truth(row, inputs)
    timing.release(device)
    for peer, make in peers(row, inputs, device):
        if not asked(peer, row, names):
            continue
        start = time.perf_counter()
        result: Result = {
            "row": row.name, "peer": peer, "length": row.length, "width": row.width, "batch": row.batch, "backward": row.backward,
        }  # fmt: skip
        try:
            result |= measured(row, make, inputs, right, device)
        except Exception as error:  # whatever a peer raises is what the row reports
            result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        timing.release(device)
        yield result | {"spent_s": time.perf_counter() - start}


def asked(peer: str, row: Row, names: list[str] | None) -> bool:
    """Whether a peer is timed on a row."""
    if names is None:
        return peer not in row.without
    return any(fnmatch.fnmatch(peer, name) for name in names)


def measured(row: Row, make: Make, inputs: tuple[Tensor, ...], right: Truth, device: str) -> Result:
    """First call, check, times, memory. Raises ArithmeticError where the numbers are wrong."""
    step_of = pushed(row, inputs, right.push)
    made: list[Made] = []

    def first() -> None:
        made.append(make())
        step_of(made[0].attend)

    first_s = timing.seconds(first, device)
    (peer,) = made
    step = partial(step_of, peer.attend)
    result: Result = {"first_s": first_s, "distance": right.distance(*step())}
    result["peak_mib"] = peak_bytes(step, device) / 2**20
    result |= times(step, device)
    result |= shared(peer, partial(step_of, peer.twice) if peer.twice is not None else None, result, device)
    result |= rates(row, result, device)
    return result


def times(step: Callable[[], object], device: str) -> dict[str, float | None]:
    """A step by events, and as a CUDA graph."""
    return {
        "ms": timing.median_ms(step, device, MILLISECONDS), "graph_ms": timing.graph_ms(step, device, MILLISECONDS),
    }  # fmt: skip


def device_ms(found: dict[str, Any]) -> float:
    """What a step takes: its graph's time where launching shows."""
    graph = found["graph_ms"]
    return float(graph if graph is not None and found["ms"] < timing.SHORT else found["ms"])


def shared(peer: Made, twice: Callable[[], object] | None, once: Result, device: str) -> Result:
    """What all layers share, `setup_ms`, and one call with a 32nd of it, `layer_ms`; nothing where they share nothing."""
    if twice is not None:
        twice()
        both = times(twice, device)
        kind = "graph_ms" if once["ms"] < timing.SHORT and None not in (once["graph_ms"], both["graph_ms"]) else "ms"
        one, two = float(once[kind]), float(both[kind] or 0.0)
        setup = max(0.0, 2 * one - two)
        return {"setup_ms": setup, "layer_ms": one - setup + setup / LAYERS}
    if peer.setup is None:
        return {}
    setup = timing.median_ms(peer.setup, device, MILLISECONDS)
    return {"setup_ms": setup, "layer_ms": device_ms(once) + setup / LAYERS}


def rates(row: Row, result: Result, device: str) -> Result:
    """TFLOP/s, and their share of what the device can do."""
    if row.flops is None:
        return {}
    rate = row.flops / device_ms(result) / 1e9
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    return {"tflops": rate, "of_peak": None if peak is None else rate / peak}


def with_first_call(result: Result, took: Mapping[tuple[str, str], float]) -> Result:
    """The result with the first call that another process timed, where one did."""
    place = (result["row"], result["peer"])
    return {**result, "first_s": took[place]} if place in took and "first_s" in result else result


def spent(results: list[Result]) -> str:
    """Where a run's time went, by peer."""
    found: dict[str, float] = defaultdict(float)
    for r in results:
        found[r["peer"]] += r["spent_s"]
    return f"{sum(found.values()):.0f} s: " + ", ".join(f"{peer} {s:.0f}" for peer, s in found.items())


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", metavar="GLOBS", help=f"which peers, on all rows they can run: 'generated,cudnn' of {NAMES}")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="compile in N processes before anything is timed")
    parser.add_argument("--plots", action="store_true", help="draw speed against length to a PNG beside the results")


def main() -> int:
    """Run the rows asked for; 1 if a number of attnfx was wrong or missing, 2 if nothing was asked for."""
    options = command.options("kernels", __doc__, quick="tiny sizes", example="causal-d128-*", more=_more)
    names = None if options.peers is None else [name.strip() for name in options.peers.split(",")]
    unknown = [name for name in names or () if not fnmatch.filter(NAMES, name)]
    rows = [quick(row) if options.quick else row for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    if unknown or not rows:
        print(f"No peer is called {', '.join(unknown)}." if unknown else f"No row is called {options.rows}.", file=sys.stderr)
        print(f"Peers: {', '.join(NAMES)}. Rows: {', '.join(row.name for row in ROWS)}.", file=sys.stderr)
        return 2
    took = first_calls(rows, options.device, options.quick, partial(asked, names=names), options.jobs)
    found = (with_first_call(r, took) for row in rows for r in run(row, options.device, names))
    results, out = command.collected("kernels", found, options)
    print(table(results, {row.name: row.targets for row in rows}) + f"\n{spent(results)}\nwritten to {out}")
    if options.plots:
        print(kernel_plots.drawn(out))
    return int(any("error" in r for r in results if r["peer"] in OURS))


if __name__ == "__main__":
    sys.exit(main())
