"""The ways in which a user may compile: symbolic and degenerate sizes, whole graphs, autocast, internal errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generation.watch import SINGLE, watched
from graphs import assert_same, compiled, torch_divides_by_no_heads
from torch import Tensor

from attnfx import backend, patterns
from attnfx.backend import rewrite
from attnfx.graphs.rewrite import Splicer
from attnfx.options import Options
from attnfx.patterns.near import NearMiss, closest


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A written-out attention with a mask that is not proved away, and a plain one."""
    keep = torch.arange(q.shape[-2])[:, None] >= torch.arange(k.shape[-2])
    scores = (q @ k.transpose(-1, -2) * 0.5 + bias).masked_fill(~keep, -1e9)
    return scores.softmax(-1) @ v, F.scaled_dot_product_attention(q, k, v)


SHAPES = {
    "empty batch": (0, 2, 5, 5),
    "no heads": (2, 0, 5, 5),
    "no queries": (2, 2, 0, 5),
    "no keys": (2, 2, 5, 0),
    "nothing": (2, 2, 0, 0),
    "one of everything": (1, 1, 1, 1),
    "one query": (1, 2, 1, 7),
    "one batch and head": (1, 1, 5, 5),
}


def inputs(batch: int, heads: int, queries: int, keys: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((batch, heads, queries, 4), (batch, heads, keys, 4), (batch, heads, keys, 4), (queries, keys))
    made = tuple(torch.randn(*shape, requires_grad=True) for shape in shapes)
    for t in made[:3]:
        torch._dynamo.mark_static(t, 3)  # head_dim: a model's, which no size of an input changes
    return made


def results(call: Any, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    out = call(*args)
    return (*out, *torch.autograd.grad(sum(t.square().sum() for t in out), args))


def shapes() -> dict[str, tuple[int, int, int, int]]:
    return {name: shape for name, shape in SHAPES.items() if not (0 in shape[:2] and torch_divides_by_no_heads())}


@pytest.mark.parametrize(("inner", "dynamic"), [("eager", None), ("aot_eager", None), ("eager", True)])
def test_sizes_of_nothing_and_one(inner: str, dynamic: bool | None) -> None:
    for name, shape in shapes().items():
        args = inputs(*shape)
        torch._dynamo.reset()
        call = torch.compile(attend, backend="attnfx", dynamic=dynamic, fullgraph=True, options={"inner": inner, "strict": True})
        try:
            assert_same(results(call, args), results(attend, args), 2e-5)
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("dynamic", [True, None])
def test_no_compile_more_for_many_sizes(dynamic: bool | None) -> None:
    sizes = ((2, 3, 6, 6), (3, 2, 9, 7), (4, 5, 8, 11), *shapes().values())

    def every_size(chosen: Any, options: Any) -> list[Any]:
        call = torch.compile(attend, backend=chosen, dynamic=dynamic, fullgraph=True, options=options)
        return [results(call, inputs(*shape)) for shape in sizes]

    with torch._dynamo.config.patch(recompile_limit=32):
        plain, mine = watched(every_size, "eager"), watched(every_size)
    for got, shape in zip(mine.result, sizes, strict=True):
        assert_same(got, results(attend, inputs(*shape)), 2e-5)
    assert mine.compiles <= plain.compiles < len(sizes)
    assert mine.sites >= 2 * mine.compiles - 2
    assert mine.missed <= {SINGLE, "no product of queries and keys was found in the logits"}  # of one key, and of none


def test_autocast_around_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(attend, q, k, v, bias, use_reentrant=False)

    args = inputs(2, 2, 5, 5)
    got, report = compiled(run, *args, inner="aot_eager")
    assert [s.site.dtype for s in report.sites] == [torch.bfloat16] * 2
    assert_same(got, run(*args))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((backend, name) for name in ("capture", "expand_composites", "regions", "caller")),
        *((Splicer, name) for name in ("splice", "prune")),
        (patterns, "match"),
    ],
)
def test_every_internal_error_raises_under_strict(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(owner, name, broken)
    args = inputs(1, 2, 5, 5)
    with pytest.raises(Exception, match="a bug of ours"):
        compiled(attend, *args)
    with pytest.warns(Warning, match="a bug of ours"):
        got, report = compiled(attend, *args, strict=False)
    assert report.sites == ()
    assert_same(got, attend(*args))


def test_one_near_miss_for_each_place_and_the_closest() -> None:
    from graphs import dynamo_graph

    from attnfx.graphs.capture import capture

    def two(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-2) @ x + (x @ x.mT).softmax(-1) @ x

    gm = dynamo_graph(two, torch.randn(2, 5, 5))
    mirror = capture(gm)
    found, missed = patterns.recognise(mirror)
    (miss,) = missed
    assert miss.read
    far = NearMiss(miss.node, "another", "it has no values")
    assert closest(mirror, found, [far, miss, far]) == [miss]
    assert closest(mirror, found, [far, far]) == [far]
    served = NearMiss(found[0].candidate.normaliser, "another", "it is something else")
    assert closest(mirror, found, [served, miss]) == [miss]
    _, report = rewrite(gm, Options(strict=True))
    assert len(report.sites) == len(report.missed) == 1
