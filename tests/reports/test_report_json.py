"""The report's JSON: what docs/report.md says of it is what it holds, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfx
from attnfx.graphs.breaks import Break
from attnfx.report import Compile, Missed, Report
from attnfx.reports.report_json import SCHEMA
from attnfx.variants import SlidingWindow

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.md"


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    x = torch.randn(1, 2, 24, 8)
    with torch.no_grad():
        report = attnfx.explain(_attention, x, x, x, policy=[attnfx.Rule("*", SlidingWindow(4))])
    compiles = (Compile("0/0", "f", "", "12:00:00", 0.5, 1),)
    whole = Report(report.sites, (Missed("m", "r", "n"),), "b", "a", ("w",), (Break("s", "r"),), compiles, report.graphs)
    return json.loads(whole.to_json())


def _documented(title: str) -> list[str]:
    section = re.split(r"^#+ ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(title)]
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "path"),
    [
        ("JSON", ()),
        ("An attention", ("sites", 0)),
        ("Its meaning", ("sites", 0, "site")),
        ("Its meaning", ("sites", 0, "original")),
        ("A near miss", ("missed", 0)),
        ("A break", ("breaks", 0)),
        ("A compile", ("compiles", 0)),
        ("A node", ("graphs", 0, "nodes", 0)),
    ],
)
def test_the_document_lists_every_field(title: str, path: tuple[str | int, ...], data: dict[str, Any]) -> None:
    found: Any = data
    for step in path:
        found = found[step]
    assert _documented(title) == list(found)


def test_the_version_is_that_of_the_document(data: dict[str, Any]) -> None:
    assert data["schema"] == SCHEMA
    assert f"the version of the format, {SCHEMA} |" in DOCUMENT.read_text(encoding="utf-8")


def test_a_variant_is_told_with_what_it_replaced(data: dict[str, Any]) -> None:
    (site,) = data["sites"]
    assert site["original"]["keep"] == "true"
    assert site["site"]["keep"] != "true"
    assert [one["way"] for one in site["considered"]] == ["vendor", "flash", "kept"]
    assert all(one["objections"] for one in site["considered"])


def test_roles_of_nodes(data: dict[str, Any]) -> None:
    nodes = {node["name"]: node for node in data["graphs"][0]["nodes"]}
    roles = {node["role"] for node in nodes.values()}
    assert roles == {"kept", "removed", "new"}
    (new,) = [node for node in nodes.values() if node["calls"] == "attnfx.attention"]
    assert new["role"] == "new"
    assert set(new["reads"]) <= set(nodes)
