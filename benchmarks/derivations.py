"""What attnfx derives from masks and biases as models write them: the formula, its rank, its form, bytes a score, and the error.

    python -m benchmarks.derivations [--rows GLOB] [--out FILE]

Each row of :mod:`benchmarks.derivation_rows` is compiled on a CPU in float32 and compared with itself in float64 (largest
difference over the largest value). ``rank``: how many numbers of each key the bias needs, as products or alone, after what all
keys of a row share is dropped; "-" where there is no such sum. ``bytes``: read for each score by bias and mask inside of a tile.
``S x S``: the elements of the largest tensor that is read and has a number for each pair of query and key, "-" for none. The exit
status is 1 where a row has an error above the bound, another rank than the known one, or no attention.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra import separation
from attnfx.backend import attnfx, listeners
from attnfx.expr import Load
from attnfx.files import replace_file
from attnfx.lowering import costs
from attnfx.lowering.derivative import widened
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.report import Report
from benchmarks import machine
from benchmarks.derivation_rows import ROWS, Row
from benchmarks.models import RESULTS

BOUND = 2e-5
HEADER = ("row", "rank", "bytes", "S x S", "error", "derived")
Result = dict[str, Any]


def run(row: Row) -> Result:
    """One row."""
    inputs = row.inputs()
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            found = torch.compile(row.attend, backend=attnfx, options={"inner": "eager", "strict": True})(*inputs)
            wide = [t.double() if t.is_floating_point() else t for t in inputs]
            want = row.attend(*wide)
    finally:
        listeners.reset(token)
    report = Report.merge(reports)
    if len(report.sites) != 1:
        return {"row": row.name, "failure": "; ".join(m.reason for m in report.missed) or "no attention found"}
    return {"row": row.name, "error": _error(found, want), "known_rank": row.rank} | _derived(report)


def _error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).abs().max() / want.abs().max())


def _derived(report: Report) -> Result:
    (site,) = report.sites
    plan = make_plan(site.site, "portable")
    read, dense = 0.0, 0
    if isinstance(plan, KernelPlan):
        ready = plan.site
        read = costs.bytes_read(ready.score) + costs.bytes_read(ready.keep)
        loads = separation.loads(ready.score) | separation.loads(ready.keep)
        dense = max((_elements(plan, n) for n in loads if _of_pairs(plan, n)), default=0)
    return {
        "formula": str(site.site), "decision": site.decision, "forms": list(site.biases), "bytes": read, "dense": dense,
        "rank": separation.bias_rank(widened(site.site.score)),
    }  # fmt: skip


def _of_pairs(plan: KernelPlan, load: Load) -> bool:
    """Whether a tensor has a number for each pair of query and key."""
    assert isinstance(load.slot, int)
    if any(t.slot == load.slot and t.relative for t in plan.tables):
        return False
    sizes = zip(load.indices, plan.site.side[load.slot].shape, strict=True)
    pairs = math.prod(int(n) for index, n in sizes if expr.depends_on(index, "i", "j"))
    return pairs >= int(plan.site.queries) * int(plan.site.keys)


def _elements(plan: KernelPlan, load: Load) -> int:
    assert isinstance(load.slot, int)
    return math.prod(int(n) for n in plan.site.side[load.slot].shape)


def wrong(result: Result) -> str:
    """What is not as it should be, or nothing."""
    if "failure" in result:
        return str(result["failure"])
    if not result["error"] <= BOUND:
        return f"error {result['error']:.1e}, the bound is {BOUND:.0e}"
    known = result["known_rank"]
    return f"rank {result['rank']}, known {known}" if known is not None and result["rank"] != known else ""


def table(results: list[Result]) -> str:
    """A line of numbers for each row, and under it the form of each term."""
    lines: list[tuple[str, ...]] = [HEADER]
    for r in results:
        if "failure" in r:
            lines.append((r["row"], "", "", "", "", f"not derived: {r['failure']}"))
            continue
        rank = "-" if r["rank"] is None else str(r["rank"])
        lines.append((r["row"], rank, f"{r['bytes']:.3g}", str(r["dense"] or "-"), f"{r['error']:.1e}", r["formula"]))
        lines += [("", "", "", "", "", f"  {text}") for text in r["forms"]]
    widths = [max(len(line[c]) for line in lines) for c in range(len(HEADER) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip() for line in lines)


def main() -> int:
    """Derive the rows asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.derivations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", default="*", metavar="GLOB", help="which rows, by name: '*alibi*'")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file")
    options = parser.parse_args()
    about = machine.describe("cpu")
    out = options.out or RESULTS / "derivations" / f"{datetime.date.today()}-{machine.slug(about)}.json"
    results = [run(row) for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"date": str(datetime.date.today()), "machine": about, "results": results}
    replace_file(out, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(table(results))
    failed = {r["row"]: why for r in results if (why := wrong(r))}
    for row, why in failed.items():
        print(f"{row}: {why}")
    print(f"written to {out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
