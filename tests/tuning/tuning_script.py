"""Run as a script under TRITON_INTERPRET=1: searches of the real kernels on the CPU with a timer that prefers what a test wants.

    python tuning_script.py NAME    one of the functions below; prints its result as JSON

The interpreter compiles nothing and its times mean nothing, so both are put in the search's place; all else is the real thing.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from tuning_calls import backward_call, example, forward_call

import attnfx.commands.tune
from attnfx.lowering import decode as split
from attnfx.lowering import flash, launch, ops
from attnfx.lowering.configs import Choice, Config, Tile
from attnfx.lowering.tuning import cache, calls, lookup, plain
from attnfx.lowering.tuning.compilers import Compiled
from attnfx.lowering.tuning.entries import Comparison, Entry
from attnfx.lowering.tuning.operands import Operands

WHO = cache.Identity("Interpreter", "0", "0", "0", "0")
timed: list[dict[str, Any]] = []


def prepared(prefer: Callable[[dict[str, Any]], float] = lambda given: 1.0) -> None:
    """This CPU as a device; ``prefer``: the milliseconds of a launch, from its arguments by name."""
    current: list[launch.Call] = []
    calls_of = Operands.calls

    def watched(self: Operands, kernel: str, choice: Choice, target: str) -> Any:
        before, chosen = calls_of(self, kernel, choice, target)
        current[:] = chosen
        return before, chosen

    def timer(call: Callable[[], None], milliseconds: float) -> float:
        call()
        if current:
            timed.append({k: v for k, v in current[0].given.items() if isinstance(v, int | bool)})
        return prefer(current[0].given) if current else 1.0

    def compiled(subject: Any, choices: Sequence[Choice], seconds: float) -> Iterator[tuple[Choice, Compiled]]:
        # the smallest tiles, and the most splits: the interpreter is slow, and two are enough
        few = sorted(choices, key=lambda c: -c.splits if isinstance(c, Tile) else c.block_m * c.block_n)[:2]
        yield from ((choice, Compiled(shared=1000)) for choice in few)

    Operands.calls = watched  # type: ignore[method-assign]
    cache.identity = lambda device: WHO
    calls.timer, calls._compiled = timer, compiled
    calls._usual = calls.Session(1e6)
    attnfx.commands.tune.here = lambda: WHO


def launches(action: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """Tile sizes, warps and stages of each kernel that an action launches, by the kernel's name."""
    found: dict[str, dict[str, int]] = {}
    run = launch.run

    def seen(kernel: Any, grid: Any, *arguments: Any, **keywords: Any) -> None:
        given = launch.Call(kernel, arguments, keywords).given
        found[kernel.__name__] = {n: given[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "STAGES", "splits") if n in given}
        run(kernel, grid, *arguments, **keywords)

    for module in (flash, split):
        module.run = seen  # type: ignore[attr-defined]
    try:
        action()
    finally:
        for module in (flash, split):
            module.run = run  # type: ignore[attr-defined]
    return found


def forward(call: Operands) -> Any:
    return ops._forward(True, call.q, call.k, call.v, call.loads, call.sizes, call.seed, call.text)


def backward(call: Operands) -> Any:
    saved = (call.out, call.lse, call.row_max, call.row_sum, call.degenerate, call.grad_out, None)
    return ops._backward(True, call.q, call.k, call.v, call.loads, call.sizes, call.seed, call.text, *saved)


def entries() -> dict[str, Any]:
    return {name: e.to_data() for name, e in cache.load(WHO).items()}


def winners() -> Any:
    """Nothing is searched for unasked; asked, each kernel's preferred tile is found, remembered and launched from then on."""
    prepared(lambda given: 1.0 if given["BLOCK_M"] == given["BLOCK_N"] == 16 else 2.0)
    call = forward_call("tile", batch=1, heads=2, queries=19, keys=69)
    back = backward_call(call)
    shipped = launches(lambda: (forward(call), backward(back)))
    unasked = len(timed)
    calls.request(call.program.key)
    first, second = forward(call), backward(back)
    searched = len(timed)
    tuned = launches(lambda: (forward(call), backward(back)))
    lookup.forget()  # as a new process would begin
    again = launches(lambda: (forward(call), backward(back)))
    close = [torch.allclose(a, b, atol=1e-5) for a, b in zip(first[:2], ops.portable.forward(*_plain(call)), strict=False)]
    close += [bool(t.isfinite().all()) for t in second]
    return {
        "unasked": unasked, "shipped": shipped, "tuned": tuned, "again": again, "entries": entries(), "close": close,
        "searched again": len(timed) - searched,
    }  # fmt: skip


def banded() -> Any:
    """What the search runs of kernels with a second product, forward and backward: the product is there."""
    call = forward_call("band")
    back = backward_call(call)
    saved = ops.portable.Result(back.out, back.lse, back.row_max, back.row_sum, back.degenerate)
    wanted = ops.portable.forward(*_plain(call))[:2], ops.portable.backward(*_plain(call), saved, back.grad_out, None)[:3]
    pairs = zip((*call.results(), *back.results()), (*wanted[0], *wanted[1]), strict=True)
    close = [torch.allclose(a, b, atol=1e-4) for a, b in pairs]
    return {"close": close, "kernels": [*call.kernels("sm90"), *back.kernels("sm90")]}


def _plain(call: Operands) -> tuple[Any, ...]:
    return call.plan, call.q, call.k, call.v, call.loads, call.sizes, call.seed


def decode() -> Any:
    """The split-KV kernels: their tile and splits are searched for, and run where they won."""
    prepared(lambda given: 1.0 / given["splits"])
    call = forward_call("window", queries=1, keys=300)
    shipped = launches(lambda: forward(call))
    calls.request(call.program.key)
    forward(call)
    return {"shipped": shipped, "tuned": launches(lambda: forward(call)), "entries": entries()}


def faulty() -> Any:
    """A kernel that is wrong in one configuration, which would be the fastest: it is dropped before it is timed."""
    prepared(lambda given: 0.1 if given["BLOCK_N"] == 16 else 1.0)
    run = Operands.run

    def wrong(self: Operands, kernel: str, choice: Choice) -> tuple[torch.Tensor, ...]:
        results = run(self, kernel, choice)
        if choice.block_n == 16:
            results[0][0, 0, 3] += 0.5
        return results

    Operands.run = wrong  # type: ignore[method-assign]
    call = forward_call("alibi", queries=37, keys=69)
    calls.request(call.program.key)
    forward(call)
    return {"entries": entries(), "timed": [t["BLOCK_N"] for t in timed]}


def distrusted() -> Any:
    """The shipped configuration differs from the plan's own meaning: nothing is timed or remembered, and a warning says so."""
    prepared()
    run = Operands.run
    Operands.run = lambda self, kernel, choice: tuple(t + 1 for t in run(self, kernel, choice))  # type: ignore[method-assign]
    call = forward_call("alibi", queries=37, keys=69)
    calls.request(call.program.key)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forward(call)
    return {"entries": entries(), "timed": timed, "warnings": [str(w.message) for w in caught]}


def captured() -> Any:
    """While a CUDA graph is captured nothing is searched for, and the next call that is not captured does it."""
    prepared()
    capturing, calls._capturing = calls._capturing, lambda device: True
    call = forward_call("alibi", queries=37, keys=69)
    calls.request(call.program.key)
    forward(call)
    during = len(timed)
    calls._capturing = capturing
    forward(call)
    return {"during": during, "after": len(timed)}


def unfit() -> Any:
    """A remembered configuration that does not compile or fit: the shipped one runs in its place, in the same call."""
    prepared()
    from triton.runtime.errors import OutOfResources

    call = forward_call("alibi", queries=37, keys=69)
    lookup.replace(torch.device("cpu"), {call.key("forward"): Entry(Config(32, 16, 4, 1), 1.0, 2.0)})
    run = launch.run

    refused = []

    def refusing(kernel: Any, grid: Any, *arguments: Any, **keywords: Any) -> None:
        if keywords["BLOCK_N"] == 16:
            refused.append(keywords["BLOCK_M"])
            raise OutOfResources(300_000, 232_448, "shared memory")
        run(kernel, grid, *arguments, **keywords)

    flash.run = refusing  # type: ignore[attr-defined]
    found = forward(call)
    return {"refused": refused, "close": torch.allclose(found.out, ops.portable.forward(*_plain(call)).out, atol=1e-5)}


class Attention(nn.Module):
    """Causal attention with a learned slope of distance, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1], device=x.device)
        z = (q @ k.mT * 0.25 + 0.1 * (at - at[:, None])).masked_fill(at > at[:, None], float("-inf"))
        return z.softmax(-1) @ v


def model() -> Any:
    """`attnfx tune` of a model, forward and backward; the second time everything is remembered."""
    prepared(lambda given: 1.0 if given["BLOCK_N"] == 16 else 2.0)
    made, x = Attention(), torch.randn(1, 69, 32)
    settings = attnfx.commands.tune.Settings(1e6, backward=True)
    told: list[str] = []
    first = attnfx.commands.tune.tune(made, (x,), {}, settings, lambda kernel, done, of, best: told.append(kernel))
    second = attnfx.commands.tune.tune(made, (x,), {}, settings)
    return {
        "first": first.to_data(), "remembered": second.remembered, "searched again": len(second.outcomes),
        "told": sorted(set(told)), "gradients": [p.grad is None for p in made.parameters()],
    }  # fmt: skip


def compared() -> Any:
    """A plain attention that the generated kernels win: the comparison is remembered, and the next decision follows it."""
    from attnfx.decide import decide
    from attnfx.policy import Policy

    prepared()
    site = example("plain", queries=40, keys=40).site.replace(keep=example("plain").site.keep, requires_grad=True)
    site = site.replace(keep=type(site).keep)
    before = decide(site, Policy()).name
    plain._device = lambda site: torch.device("cpu")
    text = plain._place(site)
    assert text is not None
    tuned: list[Operands] = []
    plain._tune = tuned.append

    def compared(*times: float) -> Comparison:
        left = iter(times)  # the vendor's forward and backward, ours, and ours again
        return plain.compare(site, text[1], torch.device("cpu"), lambda call, ms: (call(), next(left))[1])

    hopeless = compared(1.0, 3.0, 3.0, 3.1), len(tuned)
    found = compared(3.0, 3.0, 3.0, 4.0, 1.0, 1.0)
    lookup.replace(torch.device("cpu"), cache.add(WHO, {text[2]: found}))
    on_gpu = site.replace(device="cuda")
    torch.cuda.is_available = lambda: True
    after = decide(on_gpu, Policy())
    lookup.replace(torch.device("cpu"), {plain._place(on_gpu)[2]: Comparison(1.0, 0.99)})
    close = decide(on_gpu, Policy()).name
    return {
        "found": asdict(found), "before": before, "after": after.name, "reason": after.reason, "close": close,
        "tuned": len(tuned), "hopeless": [hopeless[0].generated_ms, hopeless[1]],
    }  # fmt: skip


def requested() -> Any:
    """A compile with "search" asks for its programs, one without does not."""
    from attnfx.backend import attnfx as backend

    prepared()
    calls.prepare = lambda operands: None
    plain.settle = lambda sites: False
    made, x = Attention(), torch.randn(1, 40, 32)
    found = []
    for options in ({}, {"tune": "search"}, {"mode": "max-autotune"}, {"mode": "max-autotune", "tune": "off"}):
        calls.forget()
        torch._dynamo.reset()
        torch.compile(made, backend=backend, options={"inner": "eager", **options})(x)
        found.append(len(calls._requested))
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
