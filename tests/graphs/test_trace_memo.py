"""Equal operations are traced once, and the mirror is the one that tracing each of them gives."""

import time

import pytest
import torch
from torch import nn

from attnfx.backend import rewrite
from attnfx.graphs import trace_memo
from attnfx.graphs.capture import capture
from attnfx.graphs.mirror import Mirror
from attnfx.options import Options


class Layers(nn.Module):
    """Equal layers with views, results in tuples, in-place writes through views, and two tensors that share memory."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(12, 36) for _ in range(layers))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        for linear in self.heads:
            q, k, v = linear(x).chunk(3, dim=-1)
            scores = q @ k.transpose(-1, -2)
            scores.masked_fill_(~keep, -1e9)
            left = v[..., :6]
            left.mul_(0.5)
            x = x + scores.softmax(-1) @ v
        return x


def graph(model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False) -> torch.fx.GraphModule:
    torch._dynamo.reset()
    seen: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.append(gm)
        return gm

    with torch.no_grad():
        torch.compile(model, backend=keep, dynamic=dynamic)(*inputs)
    return seen[0]


def described(mirror: Mirror) -> list[object]:
    """All that later stages read of a mirror, with storages numbered in order of appearance."""
    storages: dict[int, int] = {}
    number = {node: k for k, node in enumerate(mirror.graph.nodes)}
    lines: list[object] = []
    for node in mirror.graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        value = node.meta.get("val")
        kind = (str(tuple(value.shape)), str(value.stride()), value.dtype) if isinstance(value, torch.Tensor) else str(type(value))
        memory = storages.setdefault(mirror.storage[node], len(storages)) if node in mirror.storage else None
        maker = mirror.origin.get(node)
        lines.append((str(node.target) if node.op == "call_function" else node.op, str(args), kind, memory, maker and maker.name))
    at = {storage: k for storage, k in storages.items()}
    lines.append([(position, at[storage]) for position, storage in mirror.mutations])
    lines.append(sorted((d.name, number[m]) for d, m in mirror.value.items()))
    return lines


@pytest.mark.parametrize("dynamic", [False, True])
def test_replayed_as_traced(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = graph(Layers(3), torch.randn(2, 7, 12), torch.ones(7, 7, dtype=torch.bool).tril(), dynamic=dynamic)
    replays = []
    original = trace_memo.TraceMemo.replay
    monkeypatch.setattr(trace_memo.TraceMemo, "replay", lambda *a: replays.append(1) or original(*a))
    remembered = described(capture(gm))
    assert len(replays) > 10
    monkeypatch.setattr(trace_memo.TraceMemo, "key", lambda *a: None)
    assert remembered == described(capture(gm))


def test_layers_cost_little() -> None:
    """Thirty-two layers take less than five times the CPU time of four: a layer seen before is neither traced nor proved again."""
    spent = {}
    for layers in (4, 32):
        gm = graph(Layers(layers), torch.randn(2, 7, 12), torch.ones(7, 7, dtype=torch.bool).tril())
        rewrite(gm, Options(strict=True))  # what only a first call pays
        start = time.process_time()
        rewrite(gm, Options(strict=True))
        spent[layers] = time.process_time() - start
    assert spent[32] < 5 * spent[4] + 1, spent
