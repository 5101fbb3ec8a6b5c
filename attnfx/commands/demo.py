"""The demo: an unmodified transformers Llama on the CPU, in eager mode, under torch.compile, and under attnfx."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attnfx.errors import AttnfxError

BACKENDS = {"eager": "eager", "inductor": "torch.compile, default", "attnfx": 'torch.compile(backend="attnfx")'}
REFERENCE = "float64"


@dataclass(frozen=True)
class Settings:
    """`length` tokens through `layers` layers; the time is the median of `repeats` calls after the first."""

    length: int = 4096
    layers: int = 2
    repeats: int = 5


def run(settings: Settings, console: Console) -> dict[str, dict[str, Any]]:
    """Measure every backend in a process of its own, print the comparison, and return the numbers by backend."""
    if importlib.util.find_spec("transformers") is None:
        raise AttnfxError(
            "The demo runs the Llama of the transformers library, which is not installed. Install it with "
            "pip install 'attnfx[test]', or in a clone of the repository with pip install '.[test]'."
        )
    console.print(
        f"A transformers Llama with random weights: {settings.layers} layers, hidden size 512, 8 heads, 4 key heads, "
        f"{settings.length} tokens, float32, on this machine's CPU."
    )
    results = {}
    with tempfile.TemporaryDirectory(prefix="attnfx-demo-") as scratch:
        for backend in (REFERENCE, *BACKENDS):
            results[backend] = _measure(backend, settings, Path(scratch), console)
    console.print(_comparison(results))
    console.print(_footnote(results))
    console.print(results["attnfx"]["explain"], highlight=False, markup=False)
    return results


def _measure(backend: str, settings: Settings, scratch: Path, console: Console) -> dict[str, Any]:
    command = [sys.executable, "-m", "attnfx.commands.demo_worker", backend, str(scratch / "reference.pt")]
    command += [str(settings.length), str(settings.layers), str(settings.repeats)]
    # an empty compiler cache, so that the first call is a first call whatever ran on this machine before
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(scratch / f"cache-{backend}")}
    name = BACKENDS.get(backend, "the reference: eager in float64")
    with console.status(f"{name}: starting") as status, _worker(command, environment) as (events, errors):
        result: dict[str, Any] | None = None
        for event in events:
            result = event.get("result", result)
            status.update(f"{name}: {event.get('stage', 'done')}")
    if result is None:
        raise AttnfxError(f"The demo's measurement of {name} failed:\n{errors[0]}")
    if backend != REFERENCE:
        console.print(f"[green]✓[/green] {name}", highlight=False)
    return result


@contextmanager
def _worker(command: list[str], environment: dict[str, str]) -> Iterator[tuple[Iterator[dict[str, Any]], list[str]]]:
    """The worker's events as it reports them; its standard error is there once the block has ended."""
    errors: list[str] = []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        try:
            yield (json.loads(line) for line in process.stdout if line.startswith('{"attnfx-demo"')), errors
        finally:
            if process.poll() is None:
                try:
                    process.wait(timeout=10)  # it has closed its output: it is ending
                except subprocess.TimeoutExpired:
                    process.terminate()
                    process.wait()
            process.stdout.close()
            log.seek(0)
            errors.append(log.read())


def _comparison(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "first call, s", "time, ms", "speed", "peak memory, MB", "largest error", box=None, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    default = results["inductor"]["milliseconds"]
    for backend, name in BACKENDS.items():
        row = results[backend]
        table.add_row(
            name,
            f"{row['first_call']:.1f}",
            f"{row['milliseconds']:.0f}",
            f"{default / row['milliseconds']:.2f}x",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['error']:.1e}",
        )
    return table


def _footnote(results: dict[str, dict[str, Any]]) -> str:
    return (
        "Speed is against torch.compile's default; the first call holds the compilation, from an empty cache; the time "
        f"is the median of {results['eager']['repeats']} calls; {results['eager']['memory']}; the largest error of any "
        "output element is against eager mode in float64.\n"
    )
