"""A progress bar for searches, on standard error; nothing where that is no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: A kernel's name, how many candidates of how many are done, and the best milliseconds so far.
Tell = Callable[[str, int, int, float], None]


@contextmanager
def bar(console: Console | None = None) -> Iterator[Tell]:
    """A bar that follows what it is told, and is gone afterwards."""
    shown = console or Console(stderr=True)
    columns = TextColumn("tuning {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("attention", total=None)

        def tell(kernel: str, done: int, of: int, best: float) -> None:
            time = "" if math.isnan(best) else f", {best:.3f} ms"
            progress.update(task, description=f"{kernel.replace('_', ' ')}{time}", completed=done, total=of)

        yield tell
