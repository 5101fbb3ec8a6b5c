"""Attention with biases and masks: attnfx, FlexAttention, SDPA with a dense bias and torch.compile, side by side, in one run.

    python -m benchmarks.biases [--quick] [--rows GLOB] [--out FILE] [--device cuda|cpu]

Heads come side by side from a projection and go so to the next one. attnfx and torch.compile's default get the spelling that models
use; FlexAttention and SDPA get what one writes by hand for them.
SDPA's time holds making the dense bias where it depends on inputs. Each peer's output is checked against float32 before it is
timed (relative L2 distance). Times are medians of CUDA events with a cold L2 cache; `graph ms` is the same step as a CUDA graph,
the device's time without launches, and peers are compared by it below 1 ms; memory is the peak above the inputs. A peer that
fails is a row of data with the error in it.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnfx.testing import peak_bytes
from benchmarks import command, timing
from benchmarks.bias_rows import ROWS, Attend, Case, Row
from benchmarks.command import Result

BOUND = 2e-2
HEADER = ("row", "peer", "ms", "graph ms", "attnfx is", "asked", "peak MiB", "distance")


def peers(case: Case, device: str) -> Iterator[tuple[str, Callable[[], Attend]]]:
    """Names, and what makes the call."""
    from attnfx.backend import attnfx

    eager = merged(case.eager)
    yield "attnfx", lambda: torch.compile(eager, backend=attnfx, dynamic=False)
    flex, sdpa = case.flex, case.sdpa
    if flex is not None and device == "cuda":
        yield "flex", lambda: merged(flex())
    if sdpa is not None:
        yield "sdpa", lambda: merged(sdpa)
    yield "compiled", lambda: torch.compile(eager, dynamic=False)


def merged(attend: Attend) -> Attend:
    """The attention with its heads side by side again, as the projection behind it takes them: (B, M, H * D)."""
    return lambda *inputs: attend(*inputs).transpose(1, 2).flatten(2)


def run(row: Row, device: str, quick: bool) -> Iterator[Result]:
    """All peers of one row."""
    case = row.make(device, quick)
    with torch.no_grad():
        wide = tuple(t.float() if t.is_floating_point() else t for t in case.inputs)
        truth = merged(case.truth or case.eager)(*wide).to(torch.bfloat16).float()
        del wide
    timing.release(device)
    for peer, make in peers(case, device):
        result: Result = {"row": row.name, "peer": peer}
        try:
            result |= measured(make(), case, row.backward, truth, device)
        except Exception as error:  # whatever a peer raises is what the row reports
            result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        timing.release(device)
        yield result


def measured(call: Attend, case: Case, backward: bool, truth: Tensor, device: str) -> Result:
    """Check, then time. Raises ArithmeticError where the output is wrong."""
    wanted = {0, 1, 2, *case.learned} if backward else set()
    inputs = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(case.inputs)]
    leaves = [inputs[n] for n in sorted(wanted)]
    push = torch.randn_like(truth).to(torch.bfloat16)

    def step() -> object:
        if not backward:
            with torch.no_grad():
                return call(*inputs)
        return torch.autograd.grad(call(*inputs), leaves, push)

    with torch.set_grad_enabled(backward):
        found = call(*inputs).detach().float()
    distance = float((found - truth).norm() / truth.norm())
    del found
    if not distance <= BOUND:
        raise ArithmeticError(f"relative L2 distance {distance:.2e} from float32; the bound is {BOUND:.0e}")
    step()
    ms, peak = timing.median_ms(step, device), peak_bytes(step, device) / 2**20
    return {"ms": ms, "graph_ms": timing.graph_ms(step, device), "peak_mib": peak, "distance": distance}


def table(results: list[Result]) -> str:
    """One line a peer; beside each peer how many times as fast attnfx is, and what was asked for."""
    ours = {r["row"]: r for r in results if r["peer"] == "attnfx" and "ms" in r}
    asked = {row.name: row.targets for row in ROWS}
    lines = [HEADER]
    for r in results:
        if "error" in r:
            lines.append((r["row"], r["peer"], f"failed: {r['error'][:80]}", "", "", "", "", ""))
            continue
        speed = f"{timing.ratio(r, ours[r['row']]):.2f}x" if r["row"] in ours and r["peer"] != "attnfx" else ""
        target = asked.get(r["row"], {}).get(r["peer"])
        wanted = f"{target}x" if target else ""
        graph = "-" if r["graph_ms"] is None else f"{r['graph_ms']:.3f}"
        lines.append((r["row"], r["peer"], f"{r['ms']:.3f}", graph, speed, wanted, f"{r['peak_mib']:.0f}", f"{r['distance']:.1e}"))
    widths = [max(len(line[c]) for line in lines if not line[2].startswith("failed")) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    """Run the rows asked for; 1 if a number of attnfx was wrong or missing."""
    options = command.options("biases", __doc__, quick="tiny sizes", example="alibi-*")
    chosen = [row for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    measured_rows = (result for row in chosen for result in run(row, options.device, options.quick))
    results, out = command.collected("biases", measured_rows, options)
    print(table(results) + f"\nwritten to {out}")
    return int(any("error" in r for r in results if r["peer"] == "attnfx"))


if __name__ == "__main__":
    sys.exit(main())
