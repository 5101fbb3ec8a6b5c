"""The results of `benchmarks.models` as a text table, each peer beside torch.compile's default."""

from __future__ import annotations

from typing import Any

HEADER = ("row", "peer", "ms", "speed", "target", "peak GiB", "memory", "first call s", "distance")


def table(results: list[dict[str, Any]]) -> str:
    """One line a peer. `speed` and `memory` are against the default backend in the same row of the same run."""
    defaults = {r["row"]: r for r in results if r["peer"] == "default" and "ms" in r}
    order = list(dict.fromkeys(r["row"] for r in results))
    lines = [HEADER, *(_line(r, defaults.get(r["row"])) for row in order for r in results if r["row"] == row)]
    complete = [line for line in lines if len(line) == len(HEADER)]  # a failure's text may run over the columns
    widths = [max(len(line[column]) for line in complete) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def _line(result: dict[str, Any], default: dict[str, Any] | None) -> tuple[str, ...]:
    if "error" in result:
        return result["row"], result["peer"], f"failed: {result['error']}"[:90]
    speed = f"{default['ms'] / result['ms']:.2f}x" if default else "-"
    memory = f"{result['peak_gb'] / max(default['peak_gb'], 1e-9):.2f}x" if default else "-"
    wanted = f"{result['target']}x" if result["target"] and result["peer"] == "attnfx" else ""
    distance = "-" if result["distance"] is None else f"{result['distance']:.1e}"
    first = f"{result['first_call_s']:.1f}{' cold' if result['cold'] and result['peer'] != 'eager' else ''}"
    took, peak = f"{result['ms']:.2f}", f"{result['peak_gb']:.2f}"
    return result["row"], result["peer"], took, speed, wanted, peak, memory, first, distance
