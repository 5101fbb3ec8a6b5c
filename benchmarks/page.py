"""Writes docs/performance.md from the files of benchmarks/results.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figure import newest
from benchmarks.machine import ROOT
from benchmarks.models import RESULTS

PAGE = ROOT / "docs" / "performance.md"
_GPU = """\
# Performance

This page is written by `python -m benchmarks.page` from `benchmarks/results`; each row is one run in which the peers took turns.

## Whole models on a GPU

{machine}. Milliseconds of a call, and the peak memory in GB; *speed* is against torch.compile's default backend.

![Whole models under attnfx and under torch.compile's default backend](images/models.svg)

"""
_CPU = """
## The portable family on a CPU

{machine}. Milliseconds of a call with one thread, on cores that other work shared: compare within a row. *speed* is against
torch.compile's default, the median of the turns.

"""


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The whole page as Markdown."""
    models = _read(newest())
    cpu = _read(max((RESULTS / "cpu").glob("*-fp32.json")))
    text = _GPU.format(machine=_machine(models)) + _table(
        ("model", "eager", "torch.compile", "attnfx", "speed", "memory"), _models(models)
    )
    return text + _CPU.format(machine=_machine(cpu)) + _table(("attention", "eager", "torch.compile", "attnfx", "speed"), _cpu(cpu))


def _models(document: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for peers in _by_row(document).values():
        ours, default = peers.get("attnfx", {}), peers.get("default", {})
        if "ms" not in ours or "ms" not in default:
            continue
        times = (_ms(peers.get(peer, {})) for peer in ("eager", "default", "attnfx"))
        memory = f"{default['peak_gb']:.2f} → {ours['peak_gb']:.2f}"
        rows.append((ours["title"], *times, f"{default['ms'] / ours['ms']:.2f}x", memory))
    return rows


def _cpu(document: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row, peers in _by_row(document).items():
        if "attnfx" in peers and "paired" in peers.get("compiled", {}):
            times = (_ms(peers.get(peer, {})) for peer in ("eager", "compiled", "attnfx"))
            rows.append((row, *times, f"{peers['compiled']['paired']:.2f}x"))
    return rows


def _by_row(document: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in document["results"]:
        found.setdefault(result["row"], {})[result["peer"]] = result
    return found


def _ms(result: dict[str, Any]) -> str:
    return f"{result['ms']:.2f}" if "ms" in result else "failed"


def _machine(document: dict[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "transformers", "python"))
    return f"{machine['device']}, {versions}; {document['date']}, commit {machine['commit']}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    raise SystemExit(main())
