"""The portable family on a CPU: attnfx, torch.compile's default and eager on models' own spellings, side by side, in one run.

    python -m benchmarks.cpu [--quick] [--rows GLOB] [--out FILE]

The peers of a row take turns, call by call, so that what else the machine does falls on all of them; medians and least times are
given, and `paired`, the median over the turns of the default's time over attnfx's. A peer that takes SLOW seconds has one turn. The
first and the last head of each peer's results are checked against float64 first, gradients too where there is a backward: they are
no farther than BOUND, or than eager itself (BLOOM's sums in bfloat16 are far). A peer that fails is a row of data with the error
in it. OMP_NUM_THREADS says on how many cores; `load` is the machine's load then.
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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import command, timing
from benchmarks.command import Result

HEADS, WIDTH, WINDOW = 8, 64, 256
LENGTHS, TRAINED = (512, 2048, 8192), (512, 2048)
#: Relative L2 distance from float64 that is still right.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
#: Turns that every row gets at least, at most, and the seconds that more than the least may take; seconds of one call.
LEAST, MOST, SECONDS, SLOW = 5, 100, 15.0, 5.0
#: Milliseconds of a call that is short enough to be made once more, untimed, before each timed one.
OWN = 200.0
#: The heads that are checked.
CHECKED = (0, HEADS - 1)
#: How many times as fast as the default attnfx is to be at least: 5 % slower.
WANTED = 0.95
HEADER = ("row", "peer", "median ms", "least ms", "attnfx is", "by least", "distance", "runs as")
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def probabilities(scores: Tensor, like: Tensor) -> Tensor:
    """transformers' softmax: in float32 whatever the model's dtype is."""
    return functional.softmax(scores, dim=-1, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32).to(like.dtype)


def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """transformers' eager attention: what is not kept has the dtype's least number added."""
    lowest = torch.where(keep, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    return torch.matmul(probabilities(torch.matmul(q, k.transpose(2, 3)) * WIDTH**-0.5 + lowest, q), v)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    """Llama's mask."""
    at = torch.arange(q.shape[2])
    return masked(q, k, v, at[None, :] <= at[:, None])


def window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    """Mistral's: the last WINDOW keys."""
    at = torch.arange(q.shape[2])
    return masked(q, k, v, (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - WINDOW))


def padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    """An encoder's key padding."""
    return masked(q, k, v, mask[:, None, None, :].bool())


def alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    """BLOOM's: slope times the number of the token among those that are not padding, under a causal mask."""
    batch, heads, length, _ = q.shape
    places = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]
    bias = (slopes[..., None] * places).reshape(batch * heads, 1, length).to(q.dtype)
    at = torch.arange(length)
    lowest = torch.where(at[None, :] <= at[:, None], torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    scores = bias.baddbmm(q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), beta=1.0, alpha=WIDTH**-0.5)
    weights = probabilities(scores.view(batch, heads, length, length) + lowest, q)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view_as(q)


@dataclass(frozen=True)
class Row:
    """A spelling at one size."""

    attend: Attend
    dtype: torch.dtype
    length: int
    backward: bool

    @property
    def name(self) -> str:
        """As --rows picks it."""
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.attend.__name__}-{kind}-{self.length}{'-backward' if self.backward else ''}"

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v (1,H,S,D), a mask (1,S) whose last eighth is padding (none for ALiBi), and slopes (H,)."""
        noise = torch.Generator().manual_seed(self.length)
        q, k, v = (torch.randn(1, HEADS, self.length, WIDTH, generator=noise).to(self.dtype) for _ in range(3))
        mask = torch.ones(1, self.length, dtype=torch.int64)
        if self.attend is padding:
            mask[:, self.length - self.length // 8 :] = 0
        slopes = 2.0 ** (-8.0 / HEADS * torch.arange(1, HEADS + 1, dtype=torch.float32))
        return q, k, v, mask, slopes


ROWS = [
    Row(attend, dtype, length, backward)
    for attend in (causal, window, alibi, padding)
    for dtype in (torch.float32, torch.bfloat16)
    for backward in (False, True)
    for length in (TRAINED if backward else LENGTHS)
]
ROWS.sort(key=lambda row: row.length)


def truth(row: Row, inputs: tuple[Tensor, ...], push: Tensor) -> list[Tensor]:
    """The output and the gradients in float64 of the heads CHECKED, one at a time: all heads at once would be gigabytes."""
    q, k, v, mask, slopes = inputs
    parts = []
    for h in CHECKED:
        here = slice(h, h + 1)
        wide = [t[:, here].double().requires_grad_(row.backward) for t in (q, k, v)]
        out = row.attend(*wide, mask, slopes[here])
        grads = torch.autograd.grad(out, wide, push[:, here].double()) if row.backward else ()
        parts.append([out.detach(), *grads])
    return [torch.cat(found, 1) for found in zip(*parts, strict=True)]


def stepping(row: Row, call: Attend, inputs: tuple[Tensor, ...], push: Tensor) -> Callable[[], list[Tensor]]:
    """What is timed: the output, or the output and the gradients of q, k and v."""
    q, k, v = (t.detach().requires_grad_(row.backward) for t in inputs[:3])

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(row.backward):
            out = call(q, k, v, *inputs[3:])
            return [out.detach(), *(torch.autograd.grad(out, (q, k, v), push) if row.backward else ())]

    return step


def distance(step: Callable[[], list[Tensor]], right: list[Tensor]) -> float:
    """The largest relative L2 distance of any result from float64."""
    found = [t[:, list(CHECKED)].double() for t in step()]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))


def run(row: Row, least: int) -> Iterator[Result]:
    """All peers of one row, in turns; ``least`` turns at least."""
    from attnfx.backend import attnfx, listeners
    from attnfx.report import Report

    reports: list[Report] = []
    token = listeners.set((reports.append,))
    inputs = row.inputs()
    push = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(row.dtype)
    right = truth(row, inputs, push)
    timing.release("cpu")
    makers: dict[str, Callable[[], Attend]] = {
        "eager": lambda: row.attend,
        "attnfx": partial(torch.compile, row.attend, backend=attnfx, dynamic=False),
        "compiled": partial(torch.compile, row.attend, dynamic=False),
    }
    bound = BOUND[row.dtype]
    results, steps = {peer: Result(row=row.name, peer=peer) for peer in makers}, {}
    for peer, make in makers.items():
        try:
            step = stepping(row, make(), inputs, push)
            results[peer]["distance"] = far = distance(step, right)
            bound = max(bound, 1.1 * far) if peer == "eager" else bound
            if not far <= bound:
                raise ArithmeticError(f"relative L2 distance {far:.2e} from float64; the bound is {bound:.2e}")
            steps[peer] = step
        except Exception as error:  # whatever a peer raises is what the row reports
            results[peer]["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    listeners.reset(token)
    results["attnfx"]["decision"] = ", ".join(site.decision for site in Report.merge(reports).sites) if reports else "not compiled"
    load, taken = os.getloadavg()[0], turns(steps, least)
    for peer, times in taken.items():
        results[peer] |= {
            "ms": statistics.median(times), "least_ms": min(times), "turns": len(times), "load": round(load, 2),
        }  # fmt: skip
        if peer != "attnfx" and "attnfx" in taken:
            results[peer]["paired"] = statistics.median(a / b for a, b in zip(times, taken["attnfx"], strict=False))
    timing.release("cpu")
    yield from results.values()


def turns(steps: dict[str, Callable[[], Any]], least: int) -> dict[str, list[float]]:
    """Milliseconds of each call of each peer, which follows one of its own where those are short, so that none finds the caches and
    the memory as another one left them; in each turn another peer begins."""
    peers = list(steps)
    taken: dict[str, list[float]] = {peer: [] for peer in peers}
    start, turn = time.perf_counter(), 0
    while peers and (turn < least or (turn < MOST and time.perf_counter() - start < SECONDS)):
        for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
            if turn and taken[peer][0] < OWN:
                steps[peer]()
            if turn == 0 or taken[peer][0] < 1000 * SLOW:
                taken[peer].append(1000 * timing.seconds(steps[peer], "cpu"))
        turn += 1
    return taken


def slower(results: list[Result]) -> list[str]:
    """Rows in which attnfx is slower than the default by more than WANTED says, by paired turns or by least times."""
    ours = {r["row"]: r for r in results if r["peer"] == "attnfx"}
    rows = [r for r in results if r["peer"] == "compiled" and "paired" in r]
    return [r["row"] for r in rows if min(r["paired"], r["least_ms"] / ours[r["row"]]["least_ms"]) < WANTED]


def table(results: list[Result]) -> str:
    """One line a peer; beside each peer how many times as fast attnfx is, by paired turns and by least times."""
    ours = {r["row"]: r for r in results if r["peer"] == "attnfx" and "ms" in r}
    lines = [HEADER]
    for r in results:
        if "error" in r:
            lines.append((r["row"], r["peer"], f"failed: {r['error'][:80]}", *[""] * (len(HEADER) - 3)))
            continue
        paired = f"{r['paired']:.2f}x" if "paired" in r else ""
        least = f"{r['least_ms'] / ours[r['row']]['least_ms']:.2f}x" if paired else ""
        numbers = f"{r['ms']:.2f}", f"{r['least_ms']:.2f}", paired, least, f"{r['distance']:.1e}"
        lines.append((r["row"], r["peer"], *numbers, r.get("decision", "")))
    widths = [max(len(line[c]) for line in lines if not line[2].startswith("failed")) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    """Run the rows asked for; 1 if a result of attnfx was wrong or missing."""
    options = command.options("cpu", __doc__, quick="only 512 tokens, three turns", example="window-*", on_cpu=True)
    chosen = [row for row in ROWS if fnmatch.fnmatch(row.name, options.rows) and not (options.quick and row.length > 512)]
    results, out = command.collected("cpu", (r for row in chosen for r in run(row, 3 if options.quick else LEAST)), options)
    print(table(results) + f"\nslower than the default by more than 5 %: {', '.join(slower(results)) or 'none'}\nwritten to {out}")
    return int(any("error" in r for r in results if r["peer"] == "attnfx"))


if __name__ == "__main__":
    sys.exit(main())
