"""One case measured: the attentions of its eager forward, what attnfx makes of them, and what torch.compile's default fuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from attnfx.backend import rewrite
from attnfx.options import Options
from benchmarks.coverage.registry import Case
from benchmarks.coverage.truth import count


@dataclass
class Row:
    """``sites`` run in one eager forward; ``rewritten`` by attnfx and ``fused`` by Inductor's patterns in one compiled forward.

    ``difference`` is the largest relative L2 distance of an output, or of a tensor written in place, from the Dynamo graph run
    operation by operation. ``graphs`` under attnfx and ``plain_graphs`` without: more of them are graph breaks that attnfx added.
    ``missed`` holds [how many, reason] of near misses, ``error`` and ``skipped`` why there are no numbers.
    """

    name: str
    package: str
    spelling: str
    sites: int = 0
    sdpa_calls: int = 0
    rewritten: int = 0
    fused: int = 0
    difference: float = 0.0
    graphs: int = 0
    plain_graphs: int = 0
    missed: list[tuple[int, str]] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case) -> Row:
    """The row of one case; an exception becomes ``error``, a missing package ``skipped``."""
    row = Row(case.name, case.package, case.spelling)
    start = time.perf_counter()
    try:
        truth = count(case.build())
        row.sites, row.sdpa_calls = truth.sites, truth.fused
        _compiled(case, _attnfx_into(row))
        _compiled(case, _inductor_into(row))
    except ImportError as missing:
        row.skipped = f"{case.package} cannot be imported: {missing}"
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error)[:300]}"
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _compiled(case: Case, backend: Callable[..., Any]) -> None:
    model, args, kwargs = case.build()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)


def _attnfx_into(row: Row) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        work, report = rewrite(gm, Options(strict=True))
        row.graphs += 1
        compared = False

        def call(*args: Any) -> Any:
            nonlocal compared
            row.rewritten += len(report.sites)  # a graph that runs for every layer counts for every layer
            for missed in report.missed:
                _tally(row.missed, missed.reason)
            if compared:
                return gm(*args)
            compared = True
            row.forms += [str(site.site) for site in report.sites]
            copies = pytree.tree_map_only(Tensor, torch.clone, args)
            state = torch.get_rng_state()
            wanted = gm(*args)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            found = work(*copies)
            torch.set_rng_state(after)
            pairs = zip(pytree.tree_leaves((found, copies)), pytree.tree_leaves((wanted, args)), strict=True)
            row.difference = max(row.difference, *(_distance(a, b) for a, b in pairs))
            return wanted

        return call

    return backend


def _inductor_into(row: Row) -> Callable[..., Any]:
    """Inductor up to its graph passes, where its attention patterns match; nothing is generated, the graph itself runs."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        row.plain_graphs += 1
        before = counters["inductor"]["fuse_attention"]
        with functorch_config.patch(enable_autograd_cache=False):
            run = compile_fx(gm, list(inputs), inner_compile=_nothing)
        matched = counters["inductor"]["fuse_attention"] - before

        def call(*args: Any) -> Any:
            row.fused += matched
            return run(*args)

        return call

    return backend


def _nothing(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    from torch._functorch.aot_autograd import make_boxed_func

    return make_boxed_func(gm.forward)


def _tally(reasons: list[tuple[int, str]], reason: str) -> None:
    for k, (times, known) in enumerate(reasons):
        if known == reason:
            reasons[k] = times + 1, reason
            return
    reasons.append((1, reason))


def _distance(a: object, b: object) -> float:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and b.dtype.is_floating_point):
        return 0.0
    if bool((a.isnan() != b.isnan()).any()):
        return float("inf")
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
