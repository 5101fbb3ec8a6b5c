"""Variants on a CPU beside dense attention: torch.compile's default and eager on transformers' spelling, and torch's own kernel.

    python -m benchmarks.cpu_variants [--quick] [--rows GLOB] [--out FILE]

B1 H8 D64, float32, forward. All peers of a row take turns; `ms` and `least_ms` are the process's CPU time, so that what else the
machine does is not counted. Each variant is checked at CHECKED tokens against its own definition in float64 first. A peer that
takes cpu.SLOW seconds has one turn.
"""

from __future__ import annotations

import fnmatch
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from attnfx.policy import Policy, Rule
from attnfx.variants import BlockTopK, LinearAttention, NeighborhoodAttention, SlidingWindow, Strided
from attnfx.variants.base import Variant
from benchmarks import command, cpu
from benchmarks.command import Result

HEADER = ("row", "peer", "CPU ms", "least", "of compiled", "distance")
CHECKED, TURNS, BOUND = 1024, 5, 2e-5


@dataclass(frozen=True)
class Row:
    """A dense attention, and what is put in its place."""

    name: str
    length: int
    causal: bool
    variants: dict[str, Variant]

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The model's own spelling."""
        at = torch.arange(q.shape[2])
        return cpu.masked(q, k, v, at[None, :] <= at[:, None] if self.causal else torch.ones((), dtype=torch.bool))

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


ROWS = (
    Row("causal-8192", 8192, True, {
        "window 512": SlidingWindow(512), "window 512, 4 sinks": SlidingWindow(512, sinks=4), "strided 512": Strided(512),
        "block top-k": BlockTopK(), "linear": LinearAttention(),
    }),
    Row("full-4096", 4096, False, {"neighbourhood 13x13": NeighborhoodAttention((64, 64), (13, 13))}),
)  # fmt: skip


def inputs(length: int) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(length)
    return tuple(torch.randn(1, cpu.HEADS, length, cpu.WIDTH, generator=noise) for _ in range(3))


def distance(row: Row, variant: Variant, call: Callable[..., Tensor], length: int) -> float:
    """Relative L2 distance from the variant's definition in float64; two heads."""
    q, k, v = (t[:, :2] for t in inputs(length))
    want = variant.reference(*(t.double() for t in (q, k, v)), cpu.WIDTH**-0.5, causal=row.causal)
    return float((call(q, k, v) - want).norm() / want.norm())


def run(row: Row, turns: int) -> Iterator[Result]:
    """All peers of a row."""
    from attnfx.backend import attnfx

    peers: dict[str, Callable[..., Tensor]] = {"eager": row.dense, "sdpa": row.sdpa}
    results: dict[str, Result] = {}
    for name, variant in row.variants.items():
        torch._dynamo.reset()
        options = {"policy": Policy([Rule("*", variant)])}
        compiled = partial(torch.compile, backend=attnfx, options=options, dynamic=False)
        far = distance(row, variant, compiled(row.sdpa), row.length if not row.causal else min(row.length, CHECKED))
        results[name] = Result(row=row.name, peer=name, distance=far)
        if not far <= BOUND:
            results[name]["error"] = f"relative L2 distance {far:.2e} from float64; the bound is {BOUND:.2e}"
            continue
        torch._dynamo.reset()
        peers[name] = compiled(partial(row.sdpa))
    peers["compiled"] = torch.compile(row.dense, dynamic=False)
    q, k, v = inputs(row.length)
    taken: dict[str, list[float]] = {name: [] for name in peers}
    with torch.no_grad():
        for peer in peers.values():
            peer(q, k, v)
        for turn in range(turns):
            for name, peer in peers.items():
                if turn and taken[name][0] > 1000 * cpu.SLOW:
                    continue
                start = time.process_time()
                peer(q, k, v)
                taken[name].append(1000 * (time.process_time() - start))
    for name, times in taken.items():
        made = results.setdefault(name, Result(row=row.name, peer=name))
        made |= {
            "ms": statistics.median(times), "least_ms": min(times), "turns": len(times), "clock": "process CPU time",
            "load": round(os.getloadavg()[0], 2), "of_compiled": min(taken["compiled"]) / min(times),
        }  # fmt: skip
    yield from results.values()


def table(results: list[Result]) -> str:
    """One line a peer; how many times as fast it is as torch.compile's dense."""
    lines = [HEADER]
    for r in results:
        if "error" in r:
            lines.append((r["row"], r["peer"], f"failed: {r['error']}", "", "", ""))
            continue
        far = f"{r['distance']:.1e}" if "distance" in r else ""
        lines.append((r["row"], r["peer"], f"{r['ms']:.0f}", f"{r['least_ms']:.0f}", f"{r['of_compiled']:.2f}x", far))
    widths = [max(len(line[c]) for line in lines) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    """Run the rows asked for; 1 if a variant was wrong."""
    options = command.options("cpu_variants", __doc__, quick="512 tokens", example="causal-*", on_cpu=True)
    chosen = [row for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    if options.quick:
        chosen = [Row(row.name, 512, True, row.variants) for row in chosen if row.causal]
    turns = 2 if options.quick else TURNS
    results, out = command.collected("cpu_variants", (r for row in chosen for r in run(row, turns)), options)
    print(table(results) + f"\nwritten to {out}")
    return int(any("error" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
