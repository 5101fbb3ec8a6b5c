"""Whole compiles on a GPU: Triton kernels inside Inductor's graphs, CUDA graphs, training, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnfx.backend import attnfx, listeners
from attnfx.report import Report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS, WIDTH = 4, 256


class Block(nn.Module):
    """Self-attention over x (B, S, 256) with four heads: causal, key padding, ALiBi or a bucketed bias table, written out."""

    def __init__(self, form: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.form, self.dropout = form, dropout
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(32, HEADS))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        i = torch.arange(x.shape[1], device=x.device)
        if self.form == "plain":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        else:
            s = (q @ k.mT) / (WIDTH // HEADS) ** 0.5 + self.bias(i, x.dtype)
            wide = torch.promote_types(x.dtype, torch.float32)
            low = max(torch.finfo(x.dtype).min, torch.finfo(torch.float32).min)
            s = s.masked_fill((i > i[:, None]) | ~keep[:, None, None], low)
            out = F.dropout(s.softmax(-1, dtype=wide).to(x.dtype), self.dropout, self.training) @ v
        return x + self.out(out.transpose(1, 2).reshape(x.shape))

    def bias(self, i: Tensor, dtype: torch.dtype) -> Tensor | float:
        if self.form == "alibi":
            return (self.slopes[:, None, None] * (i - i[:, None])).to(dtype)
        if self.form == "table":
            return F.embedding((i[:, None] - i).clamp(0, 31), self.table).permute(2, 0, 1)
        return 0.0


FORMS = ("plain", "padding", "alibi", "table")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


Made = tuple[nn.Module, Tensor, Tensor]


def made(form: str, length: int = 391, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0) -> Made:
    model = Block(form, dropout).cuda().to(dtype)
    keep = torch.ones(2, length, dtype=torch.bool, device="cuda")
    keep[0, : length // 3] = False  # left padding: queries that see nothing
    return model, torch.randn(2, length, WIDTH, device="cuda", dtype=dtype), keep


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(model: Any, parameters: list[nn.Parameter], x: Tensor, keep: Tensor, weight: Tensor) -> list[Tensor]:
    out = model(x, keep)
    return [out.detach(), *torch.autograd.grad(out, parameters, weight.to(out.dtype), allow_unused=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_farther_from_float64_than_eager(form: str, dtype: torch.dtype) -> None:
    model, x, keep = made(form, dtype=dtype)
    weight = torch.randn_like(x)
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    try:
        compiled = torch.compile(model, backend=attnfx, options={"strict": True})
        got = gradients(compiled, list(model.parameters()), x, keep, weight)
    finally:
        listeners.reset(token)
    assert [s.decision for s in reports[0].sites] == ["vendor" if form == "plain" else "flash"]
    eager = gradients(model, list(model.parameters()), x, keep, weight)
    wide = Block(form).cuda().double()
    wide.load_state_dict(model.state_dict())
    exact = gradients(wide, list(wide.parameters()), x.double(), keep, weight.double())
    for mine, theirs, want in zip(got, eager, exact, strict=True):
        if want is not None:
            assert distance(mine, want) <= 1.5 * distance(theirs, want) + 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs(form: str, training: bool) -> None:
    model, x, keep = made(form)
    compiled = torch.compile(model, backend=attnfx, mode="reduce-overhead")
    weight = torch.randn_like(x)
    for _ in range(4):  # the first calls record the graph, the others replay it
        x = torch.randn_like(x)
        torch.compiler.cudagraph_mark_step_begin()
        if training:
            got = [t.clone() for t in gradients(compiled, list(model.parameters()), x, keep, weight) if t is not None]
            want = [t for t in gradients(model, list(model.parameters()), x, keep, weight) if t is not None]
        else:
            with torch.no_grad():
                got, want = [compiled(x, keep).clone()], [model(x, keep)]
        assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < 3e-2


@pytest.mark.parametrize("form", ["padding", "table"])
def test_dropout_repeats_with_its_seed_and_only_then(form: str) -> None:
    model, x, keep = made(form, dropout=0.3)
    compiled = torch.compile(model, backend=attnfx, options={"strict": True})
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gradients(compiled, list(model.parameters()), x, keep, torch.ones_like(x)))
    assert all(a is None or torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_memory_grows_with_the_length(form: str, training: bool) -> None:
    peaks = []
    for length in (4096, 8192):
        model, x, keep = made(form, length)
        compiled = torch.compile(model, backend=attnfx, dynamic=False)
        weight = torch.randn_like(x)
        for measured in (False, True):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            if training:
                gradients(compiled, list(model.parameters()), x, keep, weight)
            else:
                with torch.no_grad():
                    compiled(x, keep)
            if measured:
                peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.3 * peaks[0]
    assert peaks[1] < HEADS * 8192**2, "not even one byte a score"


def test_ten_lengths_compile_as_often_as_with_inductor() -> None:
    def compiles(**how: Any) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, _, _ = made("padding")
        compiled = torch.compile(model, **how)
        with torch.no_grad():
            for length in range(300, 400, 10):
                x = torch.randn(2, length, WIDTH, device="cuda", dtype=torch.bfloat16)
                keep = torch.ones(2, length, dtype=torch.bool, device="cuda")
                assert distance(compiled(x, keep), model(x, keep)) < 2e-2
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    assert compiles(backend=attnfx) == compiles(backend="inductor")
