"""Draws the results of `benchmarks.kernels`: speed against length, a panel for each mask and width, forward and with backward.

python -m benchmarks.kernel_plots RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.command import Result

INK = "#222222"
# Okabe and Ito's palette: told apart with any colour vision; markers tell them apart without any.
PEERS = {
    "generated": ("attnfx, generated kernel", "#0072B2", "o"),
    "chosen": ("attnfx, chosen", "#56B4E9", "D"),
    "cudnn": ("SDPA, cuDNN", "#009E73", "s"),
    "flash": ("SDPA, flash", "#E69F00", "^"),
    "efficient": ("SDPA, efficient", "#CC79A7", "v"),
    "flex": ("FlexAttention", "#D55E00", "P"),
    "compiled": ("torch.compile, eager spelling", "#999999", "X"),
    "eager": ("eager", "#BBBBBB", "."),
}
Panel = tuple[str, int]


def drawn(results: Path) -> str:
    """Draw a results file to a PNG of its name, and say where; or say why there is no picture."""
    try:
        image = results.with_suffix(".png")
        draw(json.loads(results.read_text()), image)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return f"No plot was drawn: {type(error).__name__}: {error}"
    return f"drawn to {image}"


def panels(results: list[Result]) -> dict[Panel, list[Result]]:
    """The rows of a grid over lengths, by mask and width: those of which some peer has two lengths."""
    found: dict[Panel, list[Result]] = {}
    for r in results:
        if "tflops" in r:
            found.setdefault((r["row"].partition("-")[0], r["width"]), []).append(r)
    return {panel: rows for panel, rows in found.items() if len({r["length"] for r in rows}) > 1}


def draw(document: dict[str, Any], image: Path) -> None:
    """Two rows of panels; ValueError if nothing was measured at two lengths."""
    found = panels(document["results"])
    if not found:
        raise ValueError("no mask was measured at two lengths")
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9})
    from matplotlib import pyplot

    size = (3.4 * len(found) + 0.6, 6.6)
    how: dict[str, Any] = {"figsize": size, "squeeze": False, "facecolor": "white", "layout": "constrained", "sharex": "col"}
    figure, axes = pyplot.subplots(2, len(found), **how)
    handles: dict[str, Any] = {}
    for column, ((mask, width), rows) in enumerate(found.items()):
        for row, backward in enumerate((False, True)):
            panel = axes[row][column]
            for peer, (label, colour, marker) in PEERS.items():
                points = sorted((r["length"], r["tflops"]) for r in rows if r["peer"] == peer and r["backward"] == backward)
                if points:
                    lengths, speeds = zip(*points, strict=True)
                    (handles[label],) = panel.plot(lengths, speeds, color=colour, marker=marker, markersize=5, linewidth=1.3)
            _dress(panel, rows)
            panel.set_title(f"{mask}, D={width}, {'forward + backward' if backward else 'forward'}", fontsize=9, loc="left")
        axes[1][column].set_xlabel("length")
    for row in axes:
        row[0].set_ylabel("TFLOP/s (higher is better)")
    about = document["machine"]
    figure.suptitle(f"Attention alone, bf16: {about['device']}, torch {about['torch']}", fontsize=10, x=0.01, ha="left")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150)
    pyplot.close(figure)


def _dress(panel: Any, rows: list[Result]) -> None:
    lengths = sorted({r["length"] for r in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.tick_params(colors=INK)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Draw one file."""
    if len(sys.argv) != 2:
        print("python -m benchmarks.kernel_plots RESULTS.json", file=sys.stderr)
        return 2
    said = drawn(Path(sys.argv[1]))
    print(said)
    return int(not said.startswith("drawn"))


if __name__ == "__main__":
    sys.exit(main())
