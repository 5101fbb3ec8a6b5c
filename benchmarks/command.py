"""What the command lines of benchmarks with rows share: their options, and a results file that is replaced after every row."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from attnfx.files import replace_file
from benchmarks import machine
from benchmarks.models import RESULTS

Result = dict[str, Any]


def options(
    name: str,
    about: str | None,
    *,
    quick: str,
    example: str,
    on_cpu: bool = False,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """The options of ``python -m benchmarks.NAME`` and `more`; without a GPU the sizes are the quick ones, unless ``on_cpu``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(about or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}: shows that all of it runs")
    parser.add_argument("--rows", default="*", metavar="GLOB", help=f"which rows, by name: '{example}'")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file")
    if not on_cpu:
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--commit", help="the commit to record, where this tree is no git checkout")
    more(parser)
    found = parser.parse_args(namespace=argparse.Namespace(device="cpu") if on_cpu else None)
    found.quick = found.quick or (found.device == "cpu" and not on_cpu)
    return found


def collected(name: str, results: Iterable[Result], chosen: argparse.Namespace) -> tuple[list[Result], Path]:
    """The results, each printed and written as soon as it is there, and the file."""
    today, about = str(datetime.date.today()), machine.describe(chosen.device, chosen.commit)
    out = chosen.out or RESULTS / name / f"{today}-{machine.slug(about)}{'-quick' if chosen.quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found: list[Result] = []
    for result in results:
        found.append(result)
        print(json.dumps(result), flush=True)
        document = {"date": today, "quick": chosen.quick, "machine": about, "results": found}
        replace_file(out, json.dumps(document, indent=1) + "\n")
    return found, out
