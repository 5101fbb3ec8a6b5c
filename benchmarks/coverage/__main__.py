"""The command line: ``python -m benchmarks.coverage run | table | list``."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attnfx.files import replace_file
from benchmarks.coverage.measure import measure
from benchmarks.coverage.registry import Case, load
from benchmarks.coverage.table import page

app = typer.Typer(add_completion=False, no_args_is_help=True, help="""
How many attentions of real models attnfx sees and rewrites, next to torch.compile's default.

Install the models with `pip install --no-deps -r benchmarks/coverage/requirements.txt`; what is not installed is skipped, with the
reason. No weights are downloaded: every model is small and random.

Examples:

  python -m benchmarks.coverage run --out coverage.json            every model; run it again to go on where it stopped

  python -m benchmarks.coverage run --out coverage.json hf_t5 timm   the models whose names start so, measured anew

  python -m benchmarks.coverage table coverage.json > docs/coverage.md
""")  # fmt: skip

Names = Annotated[list[str] | None, typer.Argument(help="Beginnings of names; all models without.", metavar="[NAME]...")]


def _chosen(names: list[str] | None) -> list[Case]:
    cases = [case for name, case in load().items() if not names or name.startswith(tuple(names))]
    if not cases:
        raise typer.BadParameter(f"no model's name starts with {' or '.join(names or [])}; `list` shows the names.")
    return cases


@app.command("list")
def list_cases(names: Names = None) -> None:
    """The models, their packages and what is particular about their attention."""
    for case in _chosen(names):
        typer.echo(f"{case.name:36} {case.package:24} {case.spelling}")


@app.command()
def run(
    names: Names = None,
    out: Annotated[Path, typer.Option(help="JSON file of rows, replaced after every model.")] = Path("coverage.json"),
) -> None:
    """Measure models, one row each. Rows that the file has already are kept, unless their names are asked for."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"torch": torch.__version__, "rows": {}}
    cases = [case for case in _chosen(names) if names or case.name not in data["rows"]]
    failed = 0
    for number, case in enumerate(cases, 1):
        row = measure(case)
        failed += bool(row.error)
        data["rows"][case.name] = row.to_dict()
        replace_file(out, json.dumps(data, indent=1))
        said = row.skipped or row.error or f"{row.rewritten} of {row.sites} attentions, difference {row.difference:.0e}"
        typer.echo(f"[{number}/{len(cases)}] {case.name}: {said} ({row.seconds:.0f} s)", err=True)
    if failed:
        sys.exit(1)


@app.command()
def table(file: Annotated[Path, typer.Argument(help="What `run` wrote.")]) -> None:
    """Print the page of the documentation."""
    typer.echo(page(json.loads(file.read_text())), nl=False)


if __name__ == "__main__":
    app()
