"""Writes docs/performance.md from the files of benchmarks/results.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import timing
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
_KERNELS = """
## One attention on a GPU

`python -m benchmarks.kernels`, bf16, {machine}.
Milliseconds (of the call's CUDA graph where it takes less than one); *generated* is the Triton kernel, *attnfx* what
`torch.compile` with attnfx runs, torch's own kernel where that is fastest. Both ratios are times as fast.

"""
_BIASES = """
## Biases and masks on a GPU

`python -m benchmarks.biases`, bf16, {machine}. Milliseconds, as above, and how many times as fast attnfx is.

"""
_VARIANTS = """
## Variants of a policy on a GPU

`python -m benchmarks.variants`, bf16, {machine}. Milliseconds, as above. *kept* is the share of the dense attention's pairs that a
variant keeps, *of dense* its share of the time of our dense kernel; *fla* is flash-linear-attention's kernel.

"""
_DECODE = """
## Decode steps on a GPU

`python -m benchmarks.decode`, bf16, 32 query heads over 8 key heads of width 128, {machine}. Microseconds of the step's CUDA graph.

"""
_CPU = """
## The portable family on a CPU

{machine}. Milliseconds of a call on {cores} cores. *speed* is against torch.compile's default, the median of the turns.

"""


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The whole page as Markdown."""
    models = _read(newest())
    cpu = _merged("cpu", "*-fp32*.json")
    kernels, biases, variants, steps = (_merged(folder) for folder in ("kernels", "biases", "variants", "decode"))
    return "".join((
        _GPU.format(machine=_machine(models)),
        _table(("model", "eager", "torch.compile", "attnfx", "speed", "memory"), _models(models)),
        _KERNELS.format(machine=_machine(kernels)),
        _table(("attention", "generated", "attnfx", "cuDNN", "flex", "generated / flex", "attnfx / cuDNN"), _kernels(kernels)),
        _BIASES.format(machine=_machine(biases)),
        _table(("attention", "attnfx", "flex", "SDPA", "torch.compile", "/ flex", "/ SDPA", "/ torch.compile"), _biases(biases)),
        _VARIANTS.format(machine=_machine(variants)),
        _table(("variant", "kept", "attnfx", "dense", "flex", "fla", "of dense", "/ flex", "/ fla"), _variants(variants)),
        _DECODE.format(machine=_machine(steps)),
        _table(("cache", "attnfx", "SDPA", "flex", "/ SDPA", "/ flex"), _decode(steps)),
        _CPU.format(machine=_machine(cpu), cores=cpu["machine"]["cores"]),
        _table(("attention", "eager", "torch.compile", "attnfx", "speed"), _cpu(cpu)),
    ))  # fmt: skip


def _merged(folder: str, files: str = "*-h200*.json") -> dict[str, Any]:
    """All results of some files, of each row those of the latest file that has it; "commit" names all of them."""
    documents = [_read(path) for path in sorted((RESULTS / folder).glob(files), key=lambda path: path.stem)]
    rows: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for document in documents:
        for row, peers in _by_row(document).items():
            rows[row] = document["machine"]["commit"][:7], list(peers.values())
    machine = documents[-1]["machine"] | {"commit": ", ".join(dict.fromkeys(commit for commit, _ in rows.values()))}
    return {**documents[-1], "machine": machine, "results": [result for _, results in rows.values() for result in results]}


def _kernels(document: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (row, *(_device(peers.get(p, {})) for p in ("generated", "chosen", "cudnn", "flex")),
         _faster(peers, "flex", "generated"), _faster(peers, "cudnn", "chosen"))
        for row, peers in _by_row(document).items()
    ]  # fmt: skip


def _biases(document: dict[str, Any]) -> list[tuple[str, ...]]:
    others = ("flex", "sdpa", "compiled")
    return [
        (row, *(_device(peers.get(p, {})) for p in ("attnfx", *others)), *(_faster(peers, p, "attnfx") for p in others))
        for row, peers in _by_row(document).items()
    ]  # fmt: skip


def _variants(document: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (row, _percent(peers["attnfx"].get("kept")), *(_device(peers.get(p, {})) for p in ("attnfx", "dense", "flex", "fla")),
         _share(peers),
         *(_faster(peers, p, "attnfx") for p in ("flex", "fla")))
        for row, peers in _by_row(document).items()
    ]  # fmt: skip


def _share(peers: dict[str, dict[str, Any]]) -> str:
    """Of the dense kernel's time."""
    there = "ms" in peers.get("dense", {}) and "ms" in peers["attnfx"]
    return _percent(timing.ratio(peers["attnfx"], peers["dense"])) if there else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _decode(document: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row, peers in _by_row(document).items():
        times = {peer: result["us"] for peer, result in peers.items() if "us" in result}
        if "attnfx" in times:
            faster = (f"{times[p] / times['attnfx']:.2f}x" if p in times else "-" for p in ("sdpa", "flex"))
            rows.append((row, *(f"{times[p]:.1f}" if p in times else "failed" for p in ("attnfx", "sdpa", "flex")), *faster))
    return rows


def _device(result: dict[str, Any]) -> str:
    """Milliseconds on the device: of the graph where launching would show."""
    if "ms" not in result:
        return "failed" if "error" in result else "-"
    graph = result.get("graph_ms")
    return f"{graph if graph is not None and result['ms'] < timing.SHORT else result['ms']:.3f}"


def _faster(peers: dict[str, dict[str, Any]], peer: str, ours: str) -> str:
    there = "ms" in peers.get(peer, {}) and "ms" in peers.get(ours, {})
    return f"{timing.ratio(peers[peer], peers[ours]):.2f}x" if there else "-"


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
    return f"{result['ms']:.2f}" if "ms" in result else "failed" if result else "-"


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
