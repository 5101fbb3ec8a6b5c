"""What `attnfx tune` does: a search for every attention of a model, and the file of what was found, to give away and to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils import _pytree as pytree

from attnfx import api
from attnfx.errors import AttnfxError
from attnfx.files import replace_file
from attnfx.lowering.tuning import cache, calls, lookup
from attnfx.lowering.tuning.entries import choice_to_data
from attnfx.lowering.tuning.progress import Tell
from attnfx.lowering.tuning.search import Outcome
from attnfx.policy import Policy

COLUMNS = ("kernel", "calls like", "shipped ms", "tuned ms", "gain", "configuration", "timed", "dropped", "seconds")


@dataclass(frozen=True)
class Tuned:
    """What was searched for in a model, how many kernels were remembered, and the file."""

    outcomes: tuple[Outcome, ...]
    remembered: int
    file: Path

    def to_data(self) -> dict[str, Any]:
        rows = []
        for found in self.outcomes:
            row = asdict(found) | {"shape": str(found.shape), "gain": found.gain}
            row |= {"start": choice_to_data(found.start), "best": choice_to_data(found.best)}
            rows.append({name: None if value != value else value for name, value in row.items()})  # JSON has no NaN
        return {"file": str(self.file), "remembered": self.remembered, "kernels": rows}

    def table(self) -> Table:
        made = Table(*COLUMNS, box=None, padding=(0, 2, 0, 0))
        for o in self.outcomes:
            chosen = "shipped" if o.best == o.start else " ".join(f"{k}={v}" for k, v in choice_to_data(o.best).items())
            cells = (
                o.kernel, str(o.shape), f"{o.start_ms:.3f}", f"{o.best_ms:.3f}", f"{o.gain:.2f}x", o.failure or chosen,
                str(o.timed), str(sum(o.dropped.values())), f"{o.seconds:.1f}",
            )  # fmt: skip
            made.add_row(*cells)
        return made


@dataclass(frozen=True)
class Settings:
    """Seconds for each attention and shape; whether gradients too, and what is remembered too; the policy."""

    seconds: float = calls.SECONDS
    backward: bool = False
    again: bool = False
    policy: Policy | None = None


def here() -> cache.Identity:
    """The device that is measured on. Raises AttnfxError where there is none."""
    if not torch.cuda.is_available():
        raise AttnfxError(
            f"There is no GPU here: torch {torch.__version__} found a CPU with {torch.get_num_threads()} threads, and tuning needs "
            "a CUDA or ROCm device to measure on. Kernels run in the configurations that attnfx ships."
        )
    who = cache.identity(torch.device("cuda", torch.cuda.current_device()))
    assert who is not None
    return who


def tune(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings, tell: Tell | None = None) -> Tuned:
    """Search for each attention that ``model(*args, **kwargs)`` reaches on a GPU. The model runs once, its other parts eagerly."""
    who = here()
    how = calls.Session(settings.seconds, tell, settings.again)
    calls.forget()
    lookup.forget()
    with api.fresh(), calls.session(how), torch.set_grad_enabled(settings.backward):
        compiled = api.compile(model, settings.policy, inner="eager", tune="search")
        out = compiled(*args, **kwargs)
        if settings.backward:
            _backward(model, out, (args, kwargs))
    return Tuned(tuple(how.outcomes), how.remembered, who.path)


def _backward(model: Any, out: Any, given: Any) -> None:
    """Gradients of the sum of the outputs, for the parameters and inputs that want some; nothing keeps them."""
    wanted = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted += [p for p in model.parameters() if p.requires_grad] if isinstance(model, torch.nn.Module) else []
    results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not wanted or not results:
        raise AttnfxError(
            f"The backward pass cannot be tuned: {len(wanted)} parameters and inputs and {len(results)} outputs want gradients."
        )
    torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)


def export_file(path: Path) -> int:
    """Write what is remembered for this device; how many entries. Raises AttnfxError where there is no GPU or nothing is."""
    who = here()
    entries = cache.load(who)
    if not entries:
        raise AttnfxError(f"Nothing is remembered for {who}: there is nothing to export.")
    try:
        replace_file(path.absolute(), cache.written(who, entries))
    except OSError as error:
        raise AttnfxError(f"{path} cannot be written: {error.strerror or error}.") from None
    return len(entries)


def import_file(path: Path, force: bool) -> int:
    """Take what somebody exported on a device like this one; how many entries are new."""
    return cache.import_file(path, here(), force)
