"""Compiles for `benchmarks.kernels` before anything is timed, in processes side by side, into the caches that it reads then."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import timing
from benchmarks.kernel_peers import peers
from benchmarks.kernel_rows import ROWS, Row, quick
from benchmarks.kernel_truth import pushed
from benchmarks.machine import ROOT

#: The peers that keep what they compile on disk.
KEEPING = ("flex", "compiled", "chosen", "generated", "fla")
Place = tuple[str, str]


def first_calls(rows: Sequence[Row], device: str, small: bool, asked: Callable[[str, Row], bool], jobs: int) -> dict[Place, float]:
    """Seconds of each first call, by row and peer, each in one of ``jobs`` processes; nothing without jobs. A call that fails has
    none: it will fail, or be made again, where it is timed."""
    places = [(name, row.name) for row in rows for name, _ in peers(row, (), device) if name in KEEPING and asked(name, row)]
    places.sort(key=lambda place: KEEPING.index(place[0]))  # so that what takes long is dealt evenly
    start = time.perf_counter()
    shares = [share for n in range(jobs) if (share := places[n::jobs])]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, device, "quick" if small else "whole", *(f"{row}:{peer}" for peer, row in share)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for share in shares
    ]  # fmt: skip
    found: dict[Place, float] = {}
    for process in running:
        for line in process.communicate()[0].splitlines():
            if line.startswith("{"):
                said = json.loads(line)
                found[said["row"], said["peer"]] = said["first_s"]
    if running:
        print(f"{len(found)} of {len(places)} first calls in {time.perf_counter() - start:.0f} s by {len(running)} processes")
    return found


def first_call(row: Row, peer: str, device: str) -> float:
    """Seconds of building a peer and its first call."""
    inputs = row.inputs(device)
    step = pushed(row, inputs, torch.randn_like(inputs[0]))
    make = dict(peers(row, inputs, device))[peer]
    return timing.seconds(lambda: step(make().attend), device)


def main() -> int:
    """The share of one process: rows and peers as ROW:PEER."""
    device, size, *places = sys.argv[1:]
    rows = {row.name: quick(row) if size == "quick" else row for row in ROWS}
    for place in places:
        name, _, peer = place.partition(":")
        try:
            took = first_call(rows[name], peer, device)
        except Exception as error:  # whatever a peer raises will be told where it is timed
            print(f"{place}: {type(error).__name__}", file=sys.stderr)
            continue
        finally:
            timing.release(device)
        print(json.dumps({"row": name, "peer": peer, "first_s": took}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
