"""The mirror: what it knows of the user's graph, and that making it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import compiled, dynamo_graph
from torch import Tensor

from attnfx.graphs.capture import capture, opaque
from attnfx.graphs.mirror import is_tensor, sizes
from attnfx.patterns.lift import operation


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    s = (q @ k.mT).masked_fill(j > i[:, None], float("-inf"))
    return s.softmax(-1) @ v


def qkv(s: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, s, 4).unbind()
    return q, k, v


def test_every_tensor_of_the_graph_has_a_value_and_an_origin() -> None:
    gm = dynamo_graph(attention, *qkv())
    mirror = capture(gm)
    tensors = [n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), Tensor)]
    assert tensors
    assert all(n in mirror.value for n in tensors)
    assert all(n in mirror.origin for n in mirror.graph.nodes if n.op != "output")
    assert not mirror.blind
    assert mirror.reason == ""


def test_spellings_collapse_and_composites_stay_whole() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1).matmul(v)

    names = [operation(n) for n in capture(dynamo_graph(mixed, *qkv())).graph.nodes]
    assert names.count("aten.matmul") == 2
    assert "aten.softmax" in names


@pytest.mark.parametrize("dynamic", [False, True])
def test_looking_adds_no_guard(dynamic: bool) -> None:
    gm = dynamo_graph(attention, *qkv(), dynamic=dynamic)
    example = next(n.meta["example_value"] for n in gm.graph.nodes if is_tensor_example(n))
    env = example.fake_mode.shape_env
    before = len(env.guards), dict(env.replacements)
    capture(gm)
    assert (len(env.guards), dict(env.replacements)) == before


def is_tensor_example(node: Any) -> bool:
    return isinstance(node.meta.get("example_value"), torch._subclasses.fake_tensor.FakeTensor)


def test_dynamic_sizes_are_symbols_that_map_back() -> None:
    gm = dynamo_graph(attention, *qkv(), dynamic=True)
    mirror = capture(gm)
    scores = next(n for n in mirror.graph.nodes if operation(n) == "aten.matmul")
    free = {s for size in sizes(scores) for s in size.free_symbols}
    assert free
    assert free <= set(mirror.to_user)


def test_in_place_writes_are_listed_with_their_storage() -> None:
    def written(x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(2)
        return y.relu()

    mirror = capture(dynamo_graph(written, torch.randn(3)))
    add = next(n for n in mirror.graph.nodes if operation(n) == "aten.add")
    relu = next(n for n in mirror.graph.nodes if operation(n) == "aten.relu")
    assert len(mirror.mutations) == 1
    assert mirror.overwritten(add, relu)
    assert not mirror.overwritten(relu.args[0], relu)  # type: ignore[arg-type]


def test_modes_are_restored() -> None:
    def modes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return attention(q, k, v)

    gm = dynamo_graph(modes, *qkv())
    mirror = capture(gm)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert any(n.meta["val"].dtype == torch.bfloat16 for n in mirror.graph.nodes if is_tensor(n))


def test_what_cannot_be_traced_is_opaque() -> None:
    @torch.library.custom_op("attnfx_test::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @doubled.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(F.gelu, doubled(attention(q, k, v)), use_reentrant=False)

    args = [t.requires_grad_() for t in qkv()]
    mirror = capture(dynamo_graph(checkpointed, *args))
    assert mirror.blind
    assert any(n.target is opaque for n in mirror.graph.nodes)
    got, report = compiled(checkpointed, *args)
    assert len(report.sites) == 1
    torch.testing.assert_close(got, checkpointed(*args))
