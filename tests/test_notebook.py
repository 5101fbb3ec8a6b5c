"""The example notebook runs from its first cell to its last, and is kept without outputs."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "report.ipynb"


def _shown(cell: Any) -> str:
    """The HTML of a cell's value."""
    return "".join(output["data"]["text/html"] for output in cell.outputs if output.output_type == "execute_result")


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


def test_it_runs_and_shows_reports_and_sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    report, site, approximate = [shown for cell in book.cells if cell.cell_type == "code" and (shown := _shown(cell))]
    assert report.count("<tr>") == 3
    assert "all exact" in report
    assert "<math" in site
    assert "svg" in site
    assert "def keep" in re.sub(r"<[^>]+>", "", site)
    assert "1 approximate, by policy" in approximate
