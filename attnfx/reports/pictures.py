"""Pictures of a mask's blocks as SVG, and of a bias as a small PNG inside of the page."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

from attnfx.reports.mask_blocks import DATA, FULL, PARTIAL, Blocks

_CLASSES = {FULL: "full", PARTIAL: "partial", DATA: "data"}
_WORDS = {FULL: "full", PARTIAL: "partial", DATA: "known with the data"}


def mask_svg(blocks: Blocks, size: int = 224) -> str:
    """Queries from top to bottom, keys from left to right; one path for each kind, whose colour is the page's."""
    height, width = len(blocks.kinds), len(blocks.kinds[0])
    paths = "".join(
        f'<path class="block-{name}" d="{path}"/>' for kind, name in _CLASSES.items() if (path := _path(blocks.kinds, kind))
    )
    larger = max(height, width)
    return (
        f'<svg class="mask" role="img" aria-label="{escape(described(blocks))}" viewBox="0 0 {width} {height}" '
        f'width="{size * width // larger}" height="{max(8, size * height // larger)}" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges"><rect class="block-empty" width="{width}" height="{height}"/>{paths}</svg>'
    )


def described(blocks: Blocks) -> str:
    """The picture in a sentence."""
    shares = [f"{blocks.share(kind):.0%} {word}" for kind, word in _WORDS.items() if blocks.share(kind)]
    head = "" if blocks.head is None else f", head {blocks.head}"
    grid = f"{blocks.queries} queries × {blocks.keys} keys{head} in blocks of {blocks.rows} × {blocks.columns}"
    return f"{grid}: {', '.join(shares) or 'all empty'}{', the others empty' if shares and blocks.share(0) else ''}"


def _path(kinds: tuple[tuple[int, ...], ...], kind: int) -> str:
    """Runs of equal blocks as rectangles; equal runs of rows below one another are one."""
    parts, open_runs = [], dict[tuple[int, int], int]()
    for r in range(len(kinds) + 1):
        runs = set(_runs(kinds[r], kind)) if r < len(kinds) else set()
        for run, first in list(open_runs.items()):
            if run not in runs:
                parts.append(f"M{run[0]} {first}h{run[1] - run[0]}v{r - first}h{run[0] - run[1]}z")
                del open_runs[run]
        for run in runs:
            open_runs.setdefault(run, r)
    return "".join(parts)


def _runs(line: tuple[int, ...], kind: int) -> list[tuple[int, int]]:
    found, first = [], None
    for at, each in enumerate((*line, -1)):
        if each == kind and first is None:
            first = at
        elif each != kind and first is not None:
            found.append((first, at))
            first = None
    return found


def heat_png(values: list[list[float]]) -> str:
    """A data URI: blue below zero, red above, white at zero; for numbers of one sign, from white to its colour."""
    largest = max((abs(v) for line in values for v in line), default=0.0) or 1.0
    rows = b"".join(b"\0" + b"".join(_colour(v / largest) for v in line) for line in values)
    head = struct.pack(">IIBBBBB", len(values[0]), len(values), 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _colour(share: float) -> bytes:
    end = (178, 24, 43) if share > 0 else (33, 102, 172)
    return bytes(round(247 + (channel - 247) * min(1.0, abs(share))) for channel in end)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
