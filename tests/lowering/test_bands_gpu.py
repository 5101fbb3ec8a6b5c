"""Bands on a GPU: default blocks, descriptors and edges, against float64; the same bits every time; memory that grows with S."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from lowering_sites import I, J, causal, side, site
from torch import Tensor

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.expr import Int, Score
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.sites.band import Band
from attnfx.testing import peak_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def made(m: int, n: int, width: int, dtype: torch.dtype, *, left: bool, masked: bool, device: str = "cuda") -> Any:
    """A site of B 2, H 4 over 2 with vectors for each head."""
    rows = (side(2, 4, m, width, dtype=dtype, grad=True),) if left else ()
    band = Band(0 if left else None, len(rows), Int(J.value - I.value + m - 1), width, dtype=dtype)
    sides = (*rows, side(1, 4, m + n - 1, width, dtype=dtype, grad=True))
    keep = causal(n - m) if masked else expr.TRUE
    return site(
        width**-0.5 * Score(), keep, queries=m, keys=n, head_dim=width, value_dim=width, dtype=dtype, device=device, side=sides,
        band=band,
    )  # fmt: skip


def tensors(s: Any, device: str = "cuda") -> list[Tensor]:
    """q, k, v and the loads, requiring gradients."""
    torch.manual_seed(0)
    b, h, hk, m, n = (int(x) for x in (s.batch, s.heads, s.key_heads, s.queries, s.keys))
    shapes = [(b, h, m, s.head_dim), (b, hk, n, s.head_dim), (b, hk, n, s.value_dim)]
    shapes += [tuple(int(x) for x in t.shape) for t in s.side]
    return [(torch.randn(shape, device=device) * 0.7).to(s.dtype).requires_grad_() for shape in shapes]


def stepped(s: Any, given: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of everything."""
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan), plan
    q, k, v, *loads = given
    out = torch.ops.attnfx.attention(q, k, v, loads, [], plan.to_json())
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def compared(s: Any, device: str = "cuda") -> dict[str, float]:
    """The relative L2 distance of each result from float64, as a part of what its dtype may have."""
    given = tensors(s, device)
    grad = torch.randn(*given[0].shape[:3], s.value_dim, device=device).to(s.dtype)
    found = stepped(s, given, grad)
    wide = [t.detach().double().requires_grad_() for t in given]
    out = s.reference(*wide)
    wanted = [out, *torch.autograd.grad(out, wide, grad.double())]
    names = ("out", "dq", "dk", "dv", *(f"gradient of {n}" for n in range(len(wide) - 3)))
    return {
        name: float((a.double() - b).detach().norm() / b.detach().norm()) / TOLERANCE[s.dtype]
        for name, a, b in zip(names, found, wanted, strict=True)
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("left", [False, True], ids=["queries", "rows of their own"])
@pytest.mark.parametrize(("m", "n", "width"), [(700, 700, 64), (515, 777, 128), (1024, 1024, 64), (37, 2000, 40), (600, 600, 256)])
def test_bands_on_gpu(m: int, n: int, width: int, left: bool, masked: bool, dtype: torch.dtype) -> None:
    errors = compared(made(m, n, width, dtype, left=left, masked=masked))
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


def test_gradients_are_the_same_every_time() -> None:
    s = made(900, 900, 64, torch.bfloat16, left=True, masked=True)
    given = tensors(s)
    grad = torch.randn_like(given[0])
    first, *others = (stepped(s, given, grad) for _ in range(3))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_memory_grows_with_the_length() -> None:
    s = made(8192, 8192, 64, torch.bfloat16, left=False, masked=True)
    given = tensors(s)
    grad = torch.randn_like(given[0])
    used = peak_bytes(lambda: stepped(s, given, grad), "cuda")
    assert used < 2 * 4 * 8192 * 8192 * 2 / 3
