"""Lifting against torch: the formula of a mask or bias, evaluated, is the tensor that the code computes, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from graphs import dynamo_graph
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, Int, Load
from attnfx.graphs.capture import capture
from attnfx.graphs.mirror import Mirror, sizes
from attnfx.patterns.lift import Lifter
from attnfx.patterns.versions import Past

NINF = float("-inf")
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 0, 0, 1, 1]])
TABLE = torch.linspace(-1, 1, 32).view(16, 2)


def lifted(function: Callable[..., Tensor], *args: Any) -> tuple[Expr, Mirror, tuple[sympy.Symbol, ...]]:
    """The element of the function's result at fresh symbols, one for each axis."""
    gm = dynamo_graph(function, *args)
    mirror = capture(gm)
    assert mirror.reason == ""
    (result,) = gm.graph.find_nodes(op="output")[0].args[0]
    node = mirror.value[result]
    shape = sizes(node)
    symbols = tuple(sympy.Symbol(f"x{k}", integer=True, nonnegative=True) for k in range(len(shape)))
    ranges = Ranges({}, {s: n - 1 for s, n in zip(symbols, shape, strict=True)})
    return Lifter(mirror, ranges, at=node).element(node, tuple(map(Int, symbols))), mirror, symbols


def value(e: Expr, mirror: Mirror, symbols: tuple[sympy.Symbol, ...], shape: torch.Size, args: tuple[Any, ...]) -> Tensor:
    """The formula on the whole index grid; loads read the function's own arguments."""
    placeholders = mirror.graph.find_nodes(op="placeholder")
    tensors = dict(zip(placeholders, (a for a in args if isinstance(a, Tensor)), strict=True))
    slots: dict[Any, int] = {}

    def number(n: Expr) -> Expr | None:
        if not isinstance(n, Load):
            return None
        return Load(slots.setdefault(n.slot, len(slots)), tuple(expr.rebuild(x, number) for x in n.indices), n.dtype)

    letters = "bhij"[: len(shape)]
    named = expr.substitute(expr.rebuild(e, number), {s: expr.INDEX[x] for s, x in zip(symbols, letters, strict=True)})
    grid = {
        x: torch.arange(n).view([-1 if d == k else 1 for d in range(len(shape))])
        for k, (x, n) in enumerate(zip(letters, shape, strict=True))
    }
    return evaluate(named, grid, [tensors[leaf] for leaf in slots], {}, clamp=True).expand(shape)


def t5_buckets(m: int, n: int, bidirectional: bool) -> Tensor:
    distance = torch.arange(n)[None, :] - torch.arange(m)[:, None]
    buckets, offset = 16, torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).to(torch.long) * buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    far = exact + (torch.log(distance.float() / exact) / 2.0 * (buckets - exact)).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    return offset + torch.where(distance < exact, distance, far)


def packed() -> Tensor:
    positions = torch.arange(7).unsqueeze(0).expand(2, -1)
    jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    return jumps.cumsum(-1)


FORMULAS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "causal": (lambda: torch.arange(5)[:, None] >= torch.arange(7)[None, :], ()),
    "offset": (lambda: torch.arange(3, 8)[:, None] >= torch.arange(0, 14, 2)[None, :], ()),
    "tril of ones": (lambda: torch.ones(5, 7, dtype=torch.bool).tril(2), ()),
    "triu of -inf": (lambda: torch.full((5, 5), NINF).triu(1), ()),
    "triu diagonal": (lambda: torch.triu(torch.ones(4, 6), diagonal=-1), ()),
    "window": (lambda: (torch.arange(9)[:, None] - torch.arange(9) < 4) & (torch.arange(9)[:, None] >= torch.arange(9)), ()),
    "where finfo.min": (lambda: torch.where(torch.arange(4)[:, None] >= torch.arange(4), 0.0, torch.finfo(torch.float32).min), ()),
    "masked_fill in place": (lambda: torch.zeros(4, 4).masked_fill_(torch.arange(4)[:, None] < torch.arange(4), NINF), ()),
    "one minus mask": (lambda m: (1.0 - m[:, None, None, :].float()) * -1e4, (torch.tensor([[1, 1, 0], [1, 0, 0]]),)),
    "key padding": (lambda m: (m != 0)[:, None, None, :].expand(2, 1, 4, 3), (torch.tensor([[1, 1, 0], [1, 0, 0]]),)),
    "documents": (lambda d: d[:, :, None] == d[:, None, :], (IDS,)),
    "document index": (lambda d: d[torch.arange(2)[:, None, None], torch.arange(7)[None, :, None]], (IDS,)),
    "negative index": (lambda d: d[:, torch.tensor(-2)], (IDS,)),
    "packed is one document": (packed, ()),
    "alibi": (lambda s: s[:, None, None] * (torch.arange(6)[None, None, :] - torch.arange(5)[None, :, None]), (torch.rand(3),)),
    "t5 encoder": (lambda t: F.embedding(t5_buckets(9, 9, True), t).permute(2, 0, 1), (TABLE,)),
    "t5 decoder": (lambda t: F.embedding(t5_buckets(9, 5, False), t).permute(2, 0, 1), (TABLE,)),
    "reshape": (lambda: torch.arange(24).view(2, 12).reshape(4, 6).view(2, 2, 3, 2), ()),
    "fold and transpose": (lambda d: d.view(2, 7, 1).transpose(0, 1).reshape(14), (IDS,)),
    "expand and fold": (lambda d: d[:, None, :].expand(2, 3, 7).reshape(6, 7), (IDS,)),
    "repeat_interleave": (lambda d: d.repeat_interleave(3, 1), (IDS,)),
    "repeat": (lambda d: d.repeat(2, 2), (IDS,)),
    "cat": (lambda d: torch.cat([d, d + 10, d[:, :2]], 1), (IDS,)),
    "stack": (lambda d: torch.stack([d, d * 2], 1), (IDS,)),
    "flip": (lambda d: d.flip(1), (IDS,)),
    "pad": (lambda d: F.pad(d, (2, 1), value=9), (IDS,)),
    "roll by cat": (lambda d: torch.cat([d[:, -2:], d[:, :-2]], 1), (IDS,)),
    "split": (lambda d: d.split([3, 4], 1)[1], (IDS,)),
    "chunk": (lambda d: d.chunk(3, 1)[1], (IDS,)),
    "select": (lambda d: d[1], (IDS,)),
    "strided slice": (lambda d: d[:, 1:6:2], (IDS,)),
    "gather": (lambda d: torch.gather(d, 1, d % 3), (IDS,)),
    "index_select": (lambda d: d.index_select(1, torch.arange(6, -1, -1)), (IDS,)),
    "floor division": (lambda: torch.arange(-6, 6)[:, None] // 4 + torch.arange(5) % 3, ()),
    "clamp": (lambda: (torch.arange(7)[:, None] - torch.arange(7)).clamp(-2, 3), ()),
    "bool arithmetic": (lambda: (torch.arange(4)[:, None] > torch.arange(4)).long() * 3 + (torch.arange(4) == 2), ()),
    "eye": (lambda: torch.eye(4, 6), ()),
    "bf16 rounding": (lambda s: (s[:, None] * torch.arange(300)).to(torch.bfloat16), (torch.rand(3),)),
    "xor and not": (lambda d: ~((d > 0) ^ (d < 3)), (IDS,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_equals_torch(name: str) -> None:
    function, args = FORMULAS[name]
    want = function(*args)
    found, mirror, symbols = lifted(function, *args)
    got = value(found, mirror, symbols, want.shape, args)
    assert got.dtype == want.dtype or not want.dtype.is_floating_point
    assert torch.equal(got.to(want.dtype), want)


@pytest.mark.parametrize(
    "name", ["causal", "offset", "window", "tril of ones", "packed is one document", "reshape", "floor division"]
)
def test_formulas_of_positions_need_no_load(name: str) -> None:
    found, _, _ = lifted(*[FORMULAS[name][0]], *FORMULAS[name][1])
    assert not [n for n in expr.walk(found) if isinstance(n, Load)]


def test_packed_positions_are_proved_constant() -> None:
    assert lifted(packed)[0] == expr.integer(0)


def overwritten_through_a_view() -> Tensor:
    x = torch.zeros(4, 4)
    x.view(16).add_(torch.arange(16))
    return x * 2


def test_a_write_through_a_view_is_read() -> None:
    found, mirror, symbols = lifted(overwritten_through_a_view)
    assert not [n for n in expr.walk(found) if isinstance(n, Load)]
    assert torch.equal(value(found, mirror, symbols, torch.Size((4, 4)), ()).float(), overwritten_through_a_view())


def test_a_write_through_a_view_that_cannot_be_inverted_is_data() -> None:
    def windows(x: Tensor) -> Tensor:
        y = x * 2
        y.unfold(0, 2, 2)[..., 0].zero_()
        return y + 1

    found, _, _ = lifted(windows, torch.ones(4, 4))
    (past,) = (n.slot for n in expr.walk(found) if isinstance(n, Load))
    assert isinstance(past, Past)
    assert (past.node.name, past.after.name) == ("mul", "zero_")
