"""Random masks and biases made of positions: the lifted formula has exactly torch's values.

A run tests a few hundred; ``ATTNFX_INDEX_PROGRAMS=20000 pytest tests/test_index_expressions.py -s`` as many as asked for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from graphs import dynamo_graph
from index_programs import ARGUMENTS, H, M, N, Writer, arguments
from torch import Tensor, fx

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.capture import capture
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.lift import Lifter

#: How many results one function of a run makes, and how many are made in all.
RESULTS = 10
COUNT = int(os.environ.get("ATTNFX_INDEX_PROGRAMS", "150"))
#: The least share of results that is a formula without a tensor of queries by keys.
SHARE = 0.93


def full(t: Tensor) -> Tensor:
    return t.expand(H, M, N).clone()


def program(text: str) -> Callable[..., tuple[Tensor, ...]]:
    names: dict[str, Any] = {"torch": torch, "F": F, "full": full}
    exec(text, names)
    made: Callable[..., tuple[Tensor, ...]] = names["program"]
    return made


def tensors(gm: fx.GraphModule, mirror: Mirror, args: tuple[Tensor, ...]) -> dict[fx.Node, Tensor]:
    """The value of every node of a mirror, computed with torch."""
    given_names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    read = [next(a for name, a in zip(ARGUMENTS.split(", "), args, strict=True) if name in n) for n in given_names]
    values: dict[fx.Node, Any] = dict(zip(mirror.graph.find_nodes(op="placeholder"), read, strict=True))
    owner = mirror.graph.owning_module
    for node in mirror.graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(owner, node.target)
        elif node.op == "call_function":
            given, named = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*given, **named)
    return values


def shaped(mirror: Mirror, node: fx.Node, index: tuple[Expr, ...]) -> Expr:
    ranges = Ranges({}, {x.value: sympy.Integer(n - 1) for x, n in zip(index, (H, M, N), strict=True)})  # type: ignore[attr-defined]
    inner = tuple(x.value for x in index[1:])  # type: ignore[attr-defined]
    return Lifter(mirror, ranges, at=node, inner=inner).element(node, index)


def check(seed: int) -> Counter[str]:
    """One function's results, each lifted and evaluated. Counts what was a formula and what a tensor of queries by keys."""
    text = Writer(seed).function(RESULTS)
    args = arguments(seed)
    torch._dynamo.reset()
    function = program(text)
    try:
        wanted = function(*args)
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return Counter(impossible=RESULTS)  # a combination that torch does not have
    gm = dynamo_graph(function, *args)
    mirror = capture(gm)
    assert mirror.reason == "", mirror.reason
    values = tensors(gm, mirror, args)
    counts: Counter[str] = Counter()
    index = tuple(Int(expr.INDEX[x]) for x in "hij")
    grid = {
        x: torch.arange(n).view([-1 if d == k else 1 for d in range(3)])
        for k, (x, n) in enumerate(zip("hij", (H, M, N), strict=True))
    }
    for k, (result, want) in enumerate(zip(gm.graph.find_nodes(op="output")[0].args[0], wanted, strict=True)):
        found = shaped(mirror, mirror.value[result], index)
        slots: dict[Any, int] = {}

        whole = any(
            isinstance(n, Load) and expr.depends_on(n, "i") and expr.depends_on(n, "j") and n.slot in _dense(n)
            for n in expr.walk(found)
        )
        got = evaluate(numbered(found, slots), grid, [values[s] for s in slots], {}, clamp=True).expand(want.shape)
        same = torch.equal(got.to(want.dtype).nan_to_num(12345.0), want.nan_to_num(12345.0)) and torch.equal(
            got.isnan(), want.isnan()
        )
        typed = got.dtype == want.dtype or not want.dtype.is_floating_point
        line = text.splitlines()[1 + k]
        where = got != want.to(got.dtype)
        assert typed, f"seed {seed}: {line.strip()} is {want.dtype}, its formula {got.dtype}"
        assert same, f"seed {seed}: {line.strip()}\n{found}\n{got[where]}\n{want[where]}"
        counts["data" if whole else "formula"] += 1
        if whole:
            counts.update(str(n.slot.target) for n in expr.walk(found) if isinstance(n, Load) and n.slot in _dense(n))
    return counts


def numbered(e: Expr, slots: dict[Any, int]) -> Expr:
    """``e`` with numbers for the nodes that it loads."""

    def leaf(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        return Load(slots.setdefault(node.slot, len(slots)), tuple(numbered(x, slots) for x in node.indices), node.dtype)

    return expr.rebuild(e, leaf)


def _dense(load: Load) -> tuple[Any, ...]:
    """The tensor of a load whose size is that of queries times keys."""
    shape = load.slot.meta["val"].shape  # type: ignore[attr-defined]
    return (load.slot,) if shape.numel() >= M * N else ()


def test_formulas_have_torchs_values() -> None:
    counts: Counter[str] = Counter()
    for seed in range(COUNT // RESULTS):
        counts += check(seed)
    made = counts["formula"] + counts["data"]
    print(f"{made} results, {counts['formula'] / made:.1%} without a tensor of queries by keys; {dict(counts)}")
    assert counts["formula"] >= SHARE * made
