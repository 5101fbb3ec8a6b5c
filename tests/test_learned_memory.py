"""A table of relative positions learns without a tensor of queries by keys: not in the graphs, and not in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same
from torch import Tensor

from attnfx.testing import AtenLog, peak_bytes, square_tensors

SIZE, HEADS, WIDTH = 1037, 2, 8  # longer than every tile, so that only S x S has two such axes

Bias = Callable[[Tensor, Tensor, Tensor], Tensor]


def buckets(table: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Numbers of 9 buckets of distances, 1 of them of all that are far, as an embedding."""
    return F.embedding((i - j).abs().clamp(max=8), table).permute(2, 0, 1)


def distances(table: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return table.T[:, (i - j).clamp(-4, 4) + 4]


def slopes(table: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return -table[0][:, None, None] * (i - j).abs()


BIASES = {"buckets": buckets, "distances": distances, "slopes": slopes}


def attend(bias: Bias, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return (q @ k.transpose(-1, -2) * WIDTH**-0.5 + bias(table, i, j)).softmax(-1) @ v


def given(size: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, HEADS, size, WIDTH)] * 3 + [(9, HEADS)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(call: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*leaves).square().sum(), leaves)


@pytest.mark.parametrize("name", BIASES)
def test_no_square_tensor_in_the_graphs_of_a_step(name: str) -> None:
    call, leaves, log = partial(attend, BIASES[name]), given(SIZE), AtenLog()
    torch._dynamo.reset()
    ours = gradients(torch.compile(call, backend="attnfx", options={"inner": log, "strict": True}), leaves)
    assert len(log.graphs) == 2
    assert [square_tensors(gm, SIZE - 8) for gm in log.graphs] == [[], []]
    assert_same(ours, gradients(call, leaves), 2e-4)


@pytest.mark.parametrize("name", BIASES)
def test_memory_grows_linearly(name: str) -> None:
    """Between lengths at which blocks of rows are as large as they become: one S x S tensor of bytes alone would grow by more."""
    call, peaks = partial(attend, BIASES[name]), []
    for size in (2 * SIZE, 4 * SIZE):
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="attnfx", options={"inner": "aot_eager", "strict": True})
        step = partial(gradients, compiled, given(size))
        step()
        peaks.append(min(peak_bytes(step) for _ in range(2)))
    assert peaks[1] - peaks[0] < 12 * SIZE**2, peaks


def test_deterministic_algorithms_are_enough_for_a_compiled_step() -> None:
    leaves = given(301)
    torch.use_deterministic_algorithms(True)
    try:
        for bias in BIASES.values():
            torch._dynamo.reset()
            compiled = torch.compile(partial(attend, bias), backend="attnfx", options={"inner": "aot_eager", "strict": True})
            first, *others = (gradients(compiled, leaves) for _ in range(3))
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
