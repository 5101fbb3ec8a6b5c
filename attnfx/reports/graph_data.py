"""The nodes of a report's graphs as compact JSON for the page's script, which draws a module at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnfx.report import Report
    from attnfx.reports.graph_view import GraphView

#: The folder of installed packages in front of a file, or that of the standard library.
_INSTALLED = re.compile(r"(?<!\w)(?:[A-Za-z]:)?[\\/][^\s\"']*?[\\/](?:site|dist)-packages[\\/]")
_ROLES = ("kept", "removed", "new")


def data(report: Report) -> str:
    """``{"graphs": [[name, calls, module, source, role, reads, read before], ...], "modules": [...], "sources": [...]}``, with
    numbers for everything that is a text elsewhere; safe inside of a script element."""
    texts: dict[str, dict[str, int]] = {"modules": {}, "sources": {}}
    graphs = [_rows(view, texts) for view in report.graphs]
    found: dict[str, Any] = {"graphs": graphs} | {name: list(known) for name, known in texts.items()}
    return script_safe(found)


def short(source: str) -> str:
    """Paths of files without the folder that packages are installed in, or the current one, which differ between machines."""
    return _INSTALLED.sub("", source.replace(os.path.join(os.getcwd(), ""), ""))


def script_safe(value: Any) -> str:
    """JSON that cannot end a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rows(view: GraphView, texts: dict[str, dict[str, int]]) -> list[list[Any]]:
    places = {node.name: at for at, node in enumerate(view.nodes)}

    def at(names: Iterable[str]) -> list[int]:
        return [places[name] for name in names if name in places]

    def number(kind: str, text: str) -> int:
        return texts[kind].setdefault(text, len(texts[kind]))

    return [
        [
            node.name, node.calls, number("modules", node.module), number("sources", short(node.source)), _ROLES.index(node.role),
            at(node.reads), at(node.read_before),
        ]
        for node in view.nodes
    ]  # fmt: skip
