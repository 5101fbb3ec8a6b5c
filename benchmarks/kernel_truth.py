"""What is right, for `benchmarks.kernels`: output and gradients by blocks of queries, in float32, or float64 if that is quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernel_rows import Attend, Row

SMALL = 2**22  # scores; up to so many of them float64 is quick
SCORES = 2**27  # of one block
BOUND = 2e-2


@dataclass(frozen=True)
class Truth:
    """The output (B,H,S,D), and the gradients of q, k, v and what is learned for ``push``, a gradient of the output."""

    out: Tensor
    push: Tensor
    grads: tuple[Tensor, ...] = ()

    def distance(self, out: Tensor, grads: tuple[Tensor, ...]) -> float:
        """Relative L2 distance of the farthest of them. Raises ArithmeticError where it is beyond the bound."""
        pairs = [("output", out, self.out), *zip(("dq", "dk", "dv", *["a learned gradient"] * 9), grads, self.grads, strict=False)]
        farthest = 0.0
        for name, found, right in pairs:
            away = float((found.detach().to(right.dtype) - right).norm() / right.norm())
            if not away <= BOUND:
                raise ArithmeticError(f"{name}: relative L2 distance {away:.2e} from {right.dtype}; the bound is {BOUND:.0e}")
            farthest = max(farthest, away)
        return farthest


def wanted(row: Row) -> tuple[int, ...]:
    """Which inputs have a gradient."""
    return (0, 1, 2, *(3 + n for n in row.form.learned)) if row.backward else ()


def pushed(row: Row, inputs: tuple[Tensor, ...], push: Tensor) -> Callable[[Attend], tuple[Tensor, tuple[Tensor, ...]]]:
    """What runs one step of a peer: its output, and the gradients for ``push`` where the row asks for them."""
    needed = wanted(row)
    given = [t.detach().requires_grad_(n in needed) for n, t in enumerate(inputs)]
    leaves = [given[n] for n in needed]

    def run(attend: Attend) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(row.backward):
            out = attend(*given)
            return out, torch.autograd.grad(out, leaves, push) if row.backward else ()

    return run


def truth(row: Row, inputs: tuple[Tensor, ...]) -> Truth:
    """The row's attention of the inputs as they are, rounding only in the wide dtype."""
    of_a_query = row.batch * row.heads * row.length
    dtype = torch.float64 if of_a_query * row.length <= SMALL else torch.float32
    wide = [t.detach().to(dtype) if t.is_floating_point() else t for t in inputs]
    needed = wanted(row)
    leaves = [wide[n].requires_grad_() for n in needed]
    push = torch.empty_like(inputs[0]).normal_(generator=_noise(inputs[0]))  # laid as a model's projection sends it back
    out = torch.empty(inputs[0].shape, device=inputs[0].device, dtype=dtype)
    grads = tuple(torch.zeros_like(t) for t in leaves)
    step = max(1, SCORES // of_a_query)
    for first in range(0, row.length, step):
        past = min(first + step, row.length)
        with torch.set_grad_enabled(row.backward):
            made = _rows(row, wide, first, past)
        out[:, :, first:past] = made.detach()
        if row.backward:
            for total, part in zip(grads, torch.autograd.grad(made, leaves, push[:, :, first:past].to(dtype)), strict=True):
                total += part
    return Truth(out, push, grads)


def _rows(row: Row, inputs: list[Tensor], first: int, past: int) -> Tensor:
    """The queries from ``first`` to before ``past``, without the keys after them where the mask is causal."""
    q, k, v, *loads = inputs
    last = row.length if row.form.keep is None else past
    at, bias = torch.arange(row.length, device=q.device), row.added(q, *loads)
    keep = row.keep(at[first:past, None], at[None, :last], *loads)
    key, value = (row.repeated(t[:, :, :last]) for t in (k, v))
    return row.rows_of(q[:, :, first:past], key, value, keep, None if bias is None else bias[..., first:past, :last])


def _noise(like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(2)
