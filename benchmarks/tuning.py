"""What a search is worth: the generated kernels in the shipped configuration and in the one that was found, in one run, on a GPU.

    python -m benchmarks.tuning [--quick] [--rows GLOB] [--out FILE] [--device cuda]

Forward, and backward with all its kernels, by CUDA events with a cold L2 cache, the median; the two configurations take turns. Of
plain attention the vendor's kernels are timed too. `tuning s` is what the search took, with nothing remembered; `warm s` is
what a process that finds the file spends on reading it and on its first look. What was found is remembered in a folder of the run,
not in the user's own.
"""

from __future__ import annotations

import fnmatch
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr, Load, Score
from attnfx.lowering import vendor
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.tuning import cache, calls, lookup
from attnfx.lowering.tuning.entries import choice_to_data
from attnfx.lowering.tuning.operands import Operands
from attnfx.site import AttentionSite, SideTensor
from benchmarks import command, timing
from benchmarks.command import Result

B, H, I, J = (expr.index(name) for name in "bhij")
HEADER = ("row", "pass", "shipped ms", "tuned ms", "gain", "vendor ms", "tuning s", "warm s", "timed", "dropped", "found")
ROUNDS = 5
CAUSAL = expr.le(J, I)


def plain(row: Row, q: Tensor) -> tuple[Expr, Expr, tuple[Tensor, ...]]:
    return Score() * row.width**-0.5, expr.TRUE, ()


def causal(row: Row, q: Tensor) -> tuple[Expr, Expr, tuple[Tensor, ...]]:
    return Score() * row.width**-0.5, CAUSAL, ()


def window(row: Row, q: Tensor) -> tuple[Expr, Expr, tuple[Tensor, ...]]:
    """The last 1024 keys."""
    return Score() * row.width**-0.5, expr.logical_and(CAUSAL, expr.lt(I - J, expr.integer(1024))), ()


def alibi(row: Row, q: Tensor) -> tuple[Expr, Expr, tuple[Tensor, ...]]:
    """slope[h] * (j - i)."""
    slopes = 2.0 ** (-8.0 / row.heads * torch.arange(1, row.heads + 1, device=q.device, dtype=torch.float32))
    return Score() * row.width**-0.5 + Load(0, (H,), torch.float32) * expr.cast(J - I, torch.float32), CAUSAL, (slopes,)


def swin(row: Row, q: Tensor) -> tuple[Expr, Expr, tuple[Tensor, ...]]:
    """A learned number for each head and distance in a window of 12 x 12."""
    side = 12
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    away = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + side - 1
    places = (away[..., 0] * (2 * side - 1) + away[..., 1]).to(q.device)
    table = torch.randn((2 * side - 1) ** 2, row.heads, device=q.device, dtype=torch.float32).to(q.dtype).requires_grad_()
    bias = expr.cast(Load(0, (Load(1, (I, J), torch.int64), H), q.dtype), torch.float32)
    return Score() * row.width**-0.5 + bias, expr.TRUE, (table, places)


@dataclass(frozen=True)
class Row:
    """One attention in bfloat16."""

    name: str
    form: Callable[[Row, Tensor], tuple[Expr, Expr, tuple[Tensor, ...]]]
    batch: int = 2
    heads: int = 16
    key_heads: int = 16
    length: int = 8192
    width: int = 128

    def call(self, device: str) -> tuple[AttentionSite, Operands]:
        """The site, and a call of `attnfx::flash` of noise for it."""
        torch.manual_seed(0)
        shapes = [(self.batch, self.length, heads, self.width) for heads in (self.heads, self.key_heads, self.key_heads)]
        q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16).transpose(1, 2) for s in shapes)
        score, keep, loads = self.form(self, q)
        side = tuple(SideTensor(tuple(map(sympy.Integer, t.shape)), t.dtype, t.requires_grad) for t in loads)
        sizes = [sympy.Integer(n) for n in (self.batch, self.heads, self.key_heads, self.length, self.length)]
        site = AttentionSite(*sizes, self.width, self.width, q.dtype, "cuda", score, keep, side=side, requires_grad=True)
        plan = make_plan(site, "flash")
        if not isinstance(plan, KernelPlan):
            raise ValueError(" ".join(plan))
        given = [t.detach() for t in loads]
        tables = [t.build(q, self.length, given, plan.values((), self.length, given)) for t in plan.tables]
        return site, Operands(plan.to_json(), q, k, v, (*given, *tables), ())


ROWS = (
    Row("causal-d128", causal),
    Row("causal-d64", causal, width=64),
    Row("full-d128", plain),
    Row("full-d64", plain, width=64),
    Row("window-1024", window),
    Row("alibi-causal", alibi),
    Row("gqa-32-8-causal", causal, heads=32, key_heads=8),
    Row("swin-144-d32", swin, batch=256, heads=6, key_heads=6, length=144, width=32),
)


@dataclass
class Found:
    """What one pass of a row was searched for: the configurations and how many were not timed, by kernel."""

    seconds: float = 0.0
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    timed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def run(row: Row, device: str) -> Iterator[Result]:
    """Forward and backward of one row."""
    site, forward = row.call(device)
    with torch.no_grad():
        backward = forward.following(torch.randn_like(forward.results()[0]))
    theirs = {"forward": None, "backward": None} if vendor.objections(site) else vendors(site, forward, device)
    for name, call in (("forward", forward), ("backward", backward)):
        result: Result = {"row": row.name, "pass": name, "vendor_ms": theirs[name]}
        try:
            with torch.no_grad():
                result |= measured(call, device)
        except Exception as error:  # whatever fails is what the row reports
            result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        timing.release(device)
        yield result


def measured(call: Operands, device: str) -> Result:
    """Search, then time the shipped and the found configurations in turns."""
    call.results()  # what is compiled for the shipped one is not the search's time
    found = tuned(call, device)
    shipped, mine = [], []
    for _ in range(ROUNDS):
        with lookup.forced({}):
            shipped.append(timing.median_ms(call.results, device))
        mine.append(timing.median_ms(call.results, device))
    return {
        "shipped_ms": statistics.median(shipped), "tuned_ms": statistics.median(mine), "tuning_s": found.seconds,
        "warm_s": warm(call), "timed": found.timed, "dropped": found.dropped, "found": found.chosen,
    }  # fmt: skip


def tuned(call: Operands, device: str) -> Found:
    """Search for all kernels of a call."""
    made = Found()
    with calls.session(calls.Session(tell=lambda kernel, done, of, best: None, again=True)) as how:
        calls.forget()
        made.seconds = timing.seconds(lambda: calls.prepare(call), device)
    if not how.outcomes:
        raise RuntimeError("nothing was searched for")
    for o in how.outcomes:
        if o.failure:
            raise ArithmeticError(f"{o.kernel}: {o.failure}")
        chosen = {"shipped": choice_to_data(o.start), "found": choice_to_data(o.best)}
        made.chosen[o.kernel] = {**chosen, "gain": o.gain, "seconds": o.seconds}
        made.timed += o.timed
        for reason, count in o.dropped.items():
            made.dropped[reason] = made.dropped.get(reason, 0) + count
    return made


def warm(call: Operands) -> float:
    """Seconds that the first look into the file takes, as in a new process."""
    lookup.forget()
    cache._identity.cache_clear()
    cache._kernels.cache_clear()
    start = time.perf_counter()
    lookup.tuned("forward", call.program.key, call.q, call.k, call.v, False, False)
    return time.perf_counter() - start


def vendors(site: AttentionSite, call: Operands, device: str) -> Mapping[str, float | None]:
    """Milliseconds of torch's own kernels."""
    q, k, v = (t.detach().requires_grad_() for t in (call.q, call.k, call.v))
    assert site.scale is not None
    causal, scale = vendor.is_causal(site), site.scale

    def attend() -> Tensor:
        return vendor.call(q, k, v, causal, scale, 0.0)

    def alone() -> None:
        with torch.no_grad():
            attend()

    out = attend()
    grad = torch.randn_like(out)
    back = timing.median_ms(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device)
    return {"forward": timing.median_ms(alone, device), "backward": back}


def table(results: list[Result]) -> str:
    """One line a pass."""
    lines = [HEADER]
    for r in results:
        if "error" in r:
            lines.append((r["row"], r["pass"], f"failed: {r['error'][:80]}", *[""] * (len(HEADER) - 3)))
            continue
        theirs = "-" if r["vendor_ms"] is None else f"{r['vendor_ms']:.3f}"
        fields = "block_m", "block_n", "num_warps", "num_stages", "tma"
        found = "; ".join(f"{k} {'.'.join(str(int(c['found'][f])) for f in fields)}" for k, c in r["found"].items())
        lines.append((
            r["row"], r["pass"], f"{r['shipped_ms']:.3f}", f"{r['tuned_ms']:.3f}", f"{r['shipped_ms'] / r['tuned_ms']:.2f}x",
            theirs, f"{r['tuning_s']:.1f}", f"{r['warm_s']:.3f}", str(r["timed"]), str(sum(r["dropped"].values())), found,
        ))  # fmt: skip
    widths = [max(len(line[c]) for line in lines if not line[2].startswith("failed")) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def quick(row: Row) -> Row:
    """A short row of the same form."""
    return replace(row, batch=min(row.batch, 32), length=min(row.length, 1024))


def main() -> int:
    """Run the rows asked for; 1 if one failed, 2 where there is no GPU to measure on."""
    options = command.options("tuning", __doc__, quick="short sequences", example="causal-*")
    if options.device != "cuda":
        print("There is no GPU here: a search has nothing to measure on.", file=sys.stderr)
        return 2
    chosen = [quick(row) if options.quick else row for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATTNFX_CACHE_DIR"] = folder
        results, out = command.collected("tuning", (r for row in chosen for r in run(row, options.device)), options)
    print(table(results) + f"\nwritten to {out}")
    return int(any("error" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
