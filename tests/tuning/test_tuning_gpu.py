"""Searches on a GPU: what is found is remembered and runs, also in CUDA graphs, and gives what the shipped configuration gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attnfx.backend import attnfx
from attnfx.errors import AttnfxWarning
from attnfx.lowering.tuning import cache, calls, lookup
from attnfx.lowering.tuning.entries import Comparison, Entry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    for forget in (lookup.forget, calls.forget, torch._dynamo.reset):
        forget()
    yield
    for forget in (lookup.forget, calls.forget, torch._dynamo.reset):
        forget()


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi under a causal mask, written out."""
    at = torch.arange(q.shape[2], device=q.device)
    z = q @ k.mT * q.shape[3] ** -0.5 + slopes[:, None, None] * (at - at[:, None])
    return z.masked_fill(at > at[:, None], float("-inf")).softmax(-1).to(v.dtype) @ v


def plain(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs() -> list[Tensor]:
    noise = torch.Generator("cuda").manual_seed(0)
    qkv = [torch.randn(2, 8, 1024, 64, device="cuda", generator=noise).bfloat16().requires_grad_() for _ in range(3)]
    return [*qkv, torch.rand(8, device="cuda", generator=noise)]


def results(call: Any, args: list[Tensor]) -> list[Tensor]:
    out = call(*args)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), args[:3])]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def remembered() -> dict[str, Any]:
    who = cache.identity(torch.device("cuda", torch.cuda.current_device()))
    assert who is not None
    return cache.load(who)


SEARCHING = [{"options": {"tune": "search"}}, {"mode": "max-autotune-no-cudagraphs"}]


@pytest.mark.parametrize("options", SEARCHING, ids=["option", "mode"])
def test_a_search_is_remembered_and_changes_no_result(options: dict[str, Any]) -> None:
    args = inputs()
    want = [t.clone() for t in results(torch.compile(attend, backend=attnfx), args)]
    assert remembered() == {}
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=attnfx, **options)
    with calls.session(calls.Session(30.0)) as session:
        for _ in range(2):
            got = [t.clone() for t in results(compiled, args)]
    assert {o.kernel for o in session.outcomes} == {"forward", "query_gradient", "key_gradient"}
    assert all(o.timed >= 1 and not o.failure for o in session.outcomes)
    found = remembered()
    assert {name.split()[1] for name in found} == {"forward", "query_gradient", "key_gradient"}
    assert all(isinstance(e, Entry) and e.ms <= e.default_ms for e in found.values())
    assert all(distance(a, b) < 2e-2 for a, b in zip(got, want, strict=True))


def test_nothing_is_searched_inside_of_cuda_graphs() -> None:
    args = inputs()
    want = [t.clone() for t in results(torch.compile(attend, backend=attnfx), args)]
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=attnfx, mode="max-autotune")
    with calls.session(calls.Session(30.0)) as session:
        with pytest.warns(AttnfxWarning, match="CUDA graphs"):
            results(compiled, args)
        for _ in range(3):  # the first calls run, one is captured, the others are replayed
            torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in results(compiled, args)]
    assert session.outcomes == []
    assert all(distance(a, b) < 2e-2 for a, b in zip(got, want, strict=True))


def test_workers_compile_what_is_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process compiles the shipped kernel; all candidates it finds in the cache on disk."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    compiled: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            compiled.append(str(src))

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    with calls.session(calls.Session(30.0)) as session, torch.no_grad():
        torch.compile(attend, backend=attnfx, options={"tune": "search", "inner": "eager"})(*inputs())
    assert session.outcomes[0].timed >= 1
    assert len(compiled) <= 1


def test_plain_attention_is_compared_with_the_vendor() -> None:
    args = inputs()
    want = results(plain, args)
    with calls.session(calls.Session(30.0)):
        got = results(torch.compile(plain, backend=attnfx, options={"tune": "search"}), args)
    assert any(isinstance(e, Comparison) for e in remembered().values())
    assert all(distance(a, b) < 2e-2 for a, b in zip(got, want, strict=True))
