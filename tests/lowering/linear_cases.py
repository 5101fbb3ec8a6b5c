"""Linear attention from its formula, and the cases that every lowering of it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnfx.lowering.linear.ops  # noqa: F401 - registers the operators


@dataclass(frozen=True)
class Case:
    """Sizes, and what is asked for."""

    name: str
    queries: int = 300
    keys: int = 300
    width: int = 16
    value_width: int = 8
    heads: int = 4
    key_heads: int = 2
    causal: bool = True
    decays: bool = False
    normalize: bool = False
    begun: bool = False
    batch: int = 2
    divisor: str = "add"
    scale: float = 1.0
    beside: bool = False  # the heads of a token lie beside each other


CASES = [
    Case("causal"), Case("full", causal=False), Case("full, normalised", 70, 301, causal=False, normalize=True),
    Case("normalised", normalize=True), Case("decay", decays=True, key_heads=4), Case("decay, one group", decays=True, key_heads=1),
    Case("decay, normalised, begun", decays=True, normalize=True, begun=True), Case("begun", begun=True),
    Case("few queries", 3, 200, decays=True, normalize=True), Case("one query", 1, 5, normalize=True, begun=True),
    Case("full, begun", 9, 40, causal=False, normalize=True, begun=True), Case("wide", 190, 190, 153, 40, normalize=True),
    Case("wide values", 140, 140, 24, 136, key_heads=4, decays=True), Case("no queries", 0, 40, causal=False, normalize=True),
    Case("no keys", 5, 0, causal=False, begun=True), Case("full, wide", 90, 333, 130, 33, causal=False, normalize=True),
    Case("at least", normalize=True, divisor="max"), Case("magnitude", decays=True, normalize=True, divisor="max_abs"),
    Case("magnitude, held", normalize=True, divisor="max_abs held"),
    Case("scaled", scale=-0.3, begun=True, beside=True), Case("scaled, decay, normalised", decays=True, normalize=True, scale=2.5),
    Case("scaled, full", causal=False, normalize=True, scale=0.25, beside=True), Case("scaled by nothing", scale=0.0, begun=True),
    Case("at least, full", 40, 60, causal=False, normalize=True, divisor="max", begun=True),
]  # fmt: skip


#: Which results gradients flow through.
WAYS = ((0,), (0, 1, 2, 3), (2,))
#: The same for Triton's interpreter: fewer tokens, which still make several chunks.
SMALL = [
    Case("causal", 70, 70, 8, 8, 2, 1, batch=1),
    Case("full, normalised", 20, 40, 8, 8, 2, causal=False, normalize=True, begun=True),
    Case("decay, normalised, begun", 70, 70, 8, 8, 2, 1, decays=True, normalize=True, begun=True, batch=1),
    Case("few queries", 3, 80, 8, 8, 2, decays=True, normalize=True, batch=1),
    Case("wide", 33, 33, 40, 36, 1, 1, normalize=True, batch=1),
    Case("no queries", 0, 40, 8, 8, 2, causal=False, normalize=True), Case("no keys", 5, 0, causal=False, begun=True),
    Case("magnitude", 40, 40, 8, 8, 2, 1, decays=True, normalize=True, batch=1, divisor="max_abs"),
    Case("scaled", 140, 140, 8, 8, 2, 2, decays=True, begun=True, batch=1, scale=-0.3, beside=True),
    Case("scaled, normalised", 40, 40, 8, 24, 2, 1, normalize=True, begun=True, batch=1, scale=2.5, beside=True),
    Case("scaled, full", 20, 30, 8, 8, 2, causal=False, normalize=True, batch=1, scale=0.25),
    Case("at least, held", 20, 30, 8, 8, 2, causal=False, normalize=True, batch=1, divisor="max held"),
]  # fmt: skip


def operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The arguments of the operator, with gradients wanted; weights are positive where they are divided by their sum."""
    g = torch.Generator().manual_seed(7)

    def some(*shape: int, positive: bool = False) -> Tensor:
        made = torch.randn(shape, generator=g, dtype=torch.float64)
        made = (made.abs() + 0.1 if positive else made).to(device, dtype)
        return (made.transpose(1, 2).contiguous().transpose(1, 2) if case.beside and made.dim() == 4 else made).requires_grad_()

    positive = case.normalize and case.divisor == "add"
    b, h, hk, d, e = case.batch, case.heads, case.key_heads, case.width, case.value_width
    made: dict[str, Any] = {
        "query": some(b, h, case.queries, d, positive=positive), "key": some(b, hk, case.keys, d, positive=positive),
        "value": some(b, hk, case.keys, e), "causal": case.causal, "normalize": case.normalize,
        "eps": 0.0 if not case.normalize else 0.25 if positive else 2.0, "divisor": case.divisor,
        "scale": case.scale,
    }  # fmt: skip
    if case.decays:
        made["decay"] = -torch.rand(h, generator=g).to(device) / 8
    if case.begun:
        made["state"] = some(b, h, d, e)
        if case.normalize:
            made["state_sums"] = some(b, h, d, positive=positive)
    return made


def oracle(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, normalize: bool, eps: float, decay: Tensor | None = None,
    state: Tensor | None = None, state_sums: Tensor | None = None, divisor: str = "add", scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """O, the sums of the weights, the final state and its sums, from M x N weights in float64."""
    q, k, v, M, N = query.double() * scale, key.double(), value.double(), query.shape[2], key.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    at = torch.arange(M, device=q.device)[:, None] + (N - M)
    j = torch.arange(N, device=q.device)
    log = torch.zeros(q.shape[1], 1, 1).double().to(q) if decay is None else decay.double()[:, None, None]
    by = torch.where(at >= j, torch.exp(log * (at - j).clamp(min=0)), 0.0) if causal else torch.ones(M, N).to(q)
    w = torch.einsum("bhid,bhjd->bhij", q, k) * by
    num, l = torch.einsum("bhij,bhje->bhie", w, v), w.sum(-1)
    until = torch.exp(log * (N - 1 - j)[:, None])  # (H, N, 1)
    S, z = torch.einsum("bhjd,bhje->bhde", k * until, v), (k * until).sum(2)
    if state is not None:
        since = torch.exp(log * (at + 1)) if causal else 1.0
        num = num + (q * since) @ state.double()
        S = S + torch.exp(log * N) * state.double()
        if state_sums is not None:
            l = l + ((q * since) @ state_sums.double()[..., None])[..., 0]
            z = z + torch.exp(log * N)[..., 0] * state_sums.double()
    kind, _, held = divisor.partition(" ")
    of = l.detach() if held else l
    below = of + eps if kind == "add" else (of if kind == "max" else of.abs()).clamp(min=eps)
    return (num / below[..., None], l, S, z) if normalize else (num, None, S, None)


def distances(case: Case, dtype: torch.dtype, device: str = "cpu", ways: Sequence[Sequence[int]] = WAYS) -> dict[str, float]:
    """How far the operator's results and gradients are from the oracle's, by the size of what is wanted."""
    given = operands(case, dtype, device)
    got = torch.ops.attnfx.linear_attention_states(**given)
    wide = {n: t.detach().double().requires_grad_() if isinstance(t, Tensor) and t.requires_grad else t for n, t in given.items()}
    want = oracle(**wide)
    names = ("out", "sums", "state", "state sums")
    found = {n: _far(a, b) for n, a, b in zip(names, got, want, strict=True) if b is not None}
    leaves = [n for n, t in given.items() if isinstance(t, Tensor) and t.requires_grad]
    for through in ways:
        g = torch.Generator().manual_seed(3)
        ends = [(got[n], want[n]) for n in through if want[n] is not None]
        by = [torch.randn(b.shape, generator=g).to(a) for a, b in ends]
        mine = torch.autograd.grad([a for a, _ in ends], [given[n] for n in leaves], by, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(
            [b for _, b in ends], [wide[n] for n in leaves], [t.double() for t in by], retain_graph=True, allow_unused=True
        )
        for name, a, b in zip(leaves, mine, theirs, strict=True):
            if b is not None:
                found[f"{name} through {through}"] = _far(torch.zeros_like(b) if a is None else a, b)
    return found


def _far(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    if want.numel() == 0:
        return 0.0
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1e-2))
