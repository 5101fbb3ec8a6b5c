"""The results of `benchmarks.kernels` as a text table, each peer beside attnfx's generated kernel and its chosen path."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import timing
from benchmarks.command import Result
from benchmarks.kernel_peers import CHOSEN, GENERATED

HEADER = (
    "row", "peer", "ms", "graph ms", "setup ms", "a layer", "TFLOP/s", "of peak", "peak MiB", "first s", "generated is",
    "chosen is", "asked", "distance",
)  # fmt: skip


def table(results: list[Result], targets: Mapping[str, Mapping[str, float]]) -> str:
    """One line a peer: its numbers, how many times as fast attnfx is, and how many times the row's targets ask for."""
    ours = {(r["row"], r["peer"]): r for r in results if "ms" in r}
    lines: list[tuple[str, ...]] = [HEADER]
    for r in results:
        row, peer = r["row"], r["peer"]
        if "error" in r:
            lines.append((row, peer, f"failed: {r['error'][:100]}"))
            continue
        speeds = [_speed(r, ours.get((row, name)), name) for name in (GENERATED, CHOSEN)]
        target = targets.get(row, {}).get(peer)
        share = r.get("of_peak")
        lines.append((
            row, peer, _number(r["ms"], 3), _number(r["graph_ms"], 3), _number(r.get("setup_ms"), 3), _number(r.get("layer_ms"), 3),
            _number(r.get("tflops"), 0), "-" if share is None else f"{share:.0%}", _number(r["peak_mib"], 0),
            _number(r["first_s"], 1), *speeds, f"{target}x" if target else "", f"{r['distance']:.1e}",
        ))  # fmt: skip
    complete = [line for line in lines if len(line) == len(HEADER)]  # a failure's text may run over the columns
    widths = [max(len(line[c]) for line in complete) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def speed(result: Result, ours: Result) -> float:
    """How many times as long a result took as ours: by what a layer takes where both share something between layers."""
    if "layer_ms" in result and "layer_ms" in ours:
        return float(result["layer_ms"] / ours["layer_ms"])
    return timing.ratio(result, ours)


def _speed(result: Result, ours: Result | None, name: str) -> str:
    return "" if ours is None or result["peer"] == name else f"{speed(result, ours):.2f}x"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
