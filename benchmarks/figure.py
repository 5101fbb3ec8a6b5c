"""Draws docs/images/models.svg from the newest results: speed of each peer against torch.compile's default.

python -m benchmarks.figure [RESULTS.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.models import RESULTS

IMAGE = ROOT / "docs" / "images" / "models.svg"
INK = "#222222"
# Okabe and Ito's palette: told apart with any colour vision, and different in grey as well.
PEERS = {
    "eager": ("eager", "#BBBBBB"),
    "default": ("torch.compile, default backend", "#56B4E9"),
    "patched": ("torch.compile, mask patched away by hand", "#E69F00"),
    "attnfx": ('torch.compile, backend="attnfx"', "#0072B2"),
}


def main() -> int:
    """Draw, and say from which file."""
    try:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
        document = json.loads(path.read_text())
        draw(document, IMAGE)
    except (FileNotFoundError, ValueError) as error:
        print(f"No figure was drawn: {error}", file=sys.stderr)
        return 1
    print(f"{IMAGE.relative_to(ROOT)} drawn from {path}")
    return 0


def newest() -> Path:
    """The latest full results file; FileNotFoundError if there is none."""
    files = [path for path in RESULTS.glob("*.json") if not json.loads(path.read_text()).get("quick", True)]
    if not files:
        raise FileNotFoundError(f"{RESULTS} holds no full results; run `python -m benchmarks.models` on a GPU first")
    return max(files, key=lambda path: (json.loads(path.read_text())["date"], path.name))


def draw(document: dict[str, Any], image: Path) -> None:
    """Horizontal bars in groups, one group a row; ValueError if no row has both the default backend and attnfx."""
    groups = _groups(document["results"])
    if not groups:
        raise ValueError("no row of the results has times of both torch.compile's default backend and attnfx")
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "attnfx", "font.family": "DejaVu Sans", "font.size": 9})
    from matplotlib import pyplot

    bars = sum(len(group) for _, group in groups)
    # An opaque white card: readable on light and dark pages alike.
    size = (8, 0.24 * bars + 0.3 * len(groups) + 1.1)
    figure, axes = pyplot.subplots(figsize=size, facecolor="white", layout="constrained")
    y, ticks, seen = 0.0, list[tuple[float, str]](), set[str]()
    for title, group in groups:
        ticks.append((y + (len(group) - 1) / 2, title))
        for peer, result in group.items():
            speed = group["default"]["ms"] / result["ms"]
            label, colour = PEERS[peer]
            style: dict[str, Any] = {} if peer in seen else {"label": label}
            axes.barh(y, speed, 0.85, color=colour, edgecolor="black", linewidth=0.4, **style)
            axes.text(speed + 0.02, y, f"{speed:.2f}x  {result['ms']:.1f} ms", va="center", fontsize=7.5, color=INK)
            seen.add(peer)
            y += 1
        y += 0.8
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks([at for at, _ in ticks], [title for _, title in ticks])
    axes.invert_yaxis()
    axes.margins(x=0.16, y=0.01)
    axes.set_xlabel("speed against torch.compile's default backend (higher is better)")
    about = document["machine"]
    title = f"Unmodified models, 2 layers, bf16: {about['device']}, torch {about['torch']}"
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None})
    pyplot.close(figure)


def _groups(results: list[dict[str, Any]]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    titles = dict.fromkeys(result["title"] for result in results)
    measured = {title: {r["peer"]: r for r in results if r["title"] == title and "ms" in r} for title in titles}
    return [
        (title, {peer: group[peer] for peer in PEERS if peer in group})
        for title, group in measured.items()
        if {"default", "attnfx"} <= group.keys()
    ]


if __name__ == "__main__":
    sys.exit(main())
