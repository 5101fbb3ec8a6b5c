"""The measured rows as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def page(data: Mapping[str, Any]) -> str:
    """What ``docs/coverage.md`` holds."""
    rows = [row for row in data["rows"].values() if not row["skipped"] and not row["error"]]
    left = [row for row in data["rows"].values() if row["skipped"] or row["error"]]
    total, rewritten, fused = (sum(values) for values in zip(*map(_counts, rows), strict=True)) if rows else (0, 0, 0)
    breaks = sum(max(row["graphs"] - row["plain_graphs"], 0) for row in rows)
    parts = [
        "# What attnfx sees in real models",
        f"Of {total} attentions that one forward of each of {len(rows)} models runs, attnfx rewrites **{rewritten}** "
        f"({_percent(rewritten, total)}); torch.compile's default fuses {fused} ({_percent(fused, total)}) by its patterns, "
        "calls of `scaled_dot_product_attention` counted as fused. "
        f"The largest difference from the graph run op by op is {max((r['difference'] for r in rows), default=0):.1e}. "
        f"Graph breaks added: {breaks}.",
        f"Measured with torch {data['torch']} on a CPU, small random weights, by "
        "`python -m benchmarks.coverage run --out FILE.json`; this page is `python -m benchmarks.coverage table FILE.json`.",
        _table(("model", "spelling", "attentions", "attnfx", "default", "difference"), map(_line, rows)),
        "## What is left, and why",
        _table(("model", "times", "reason"), (line for row in rows for line in _reasons(row))),
    ]
    if left:
        parts += ["## Not measured", _table(("model", "why"), ((r["name"], r["skipped"] or r["error"]) for r in left))]
    return "\n\n".join(parts) + "\n"


def _counts(row: Row) -> tuple[int, int, int]:
    sites: int = row["sites"]
    return sites, min(row["rewritten"], sites), min(row["fused"] + row["sdpa_calls"], sites)


def _line(row: Row) -> tuple[str, ...]:
    sites, _, fused = _counts(row)
    return row["name"], row["spelling"], str(sites), str(row["rewritten"]), str(fused), f"{row['difference']:.0e}"


def _reasons(row: Row) -> Iterable[tuple[str, ...]]:
    return ((row["name"], str(times), reason) for times, reason in row["missed"] if row["rewritten"] < row["sites"])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows)
