"""Random programs of in-place edits: views of a tensor, and what is done to them in place, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]
Edit = Callable[[Tensor], object]


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def draw_view(rng: random.Random, shape: Sequence[int]) -> tuple[str, View]:
    """A view of a contiguous tensor of ``shape`` (rank two or more) that repeats nothing."""
    m, n = shape[-2:]
    a, c = rng.randrange(m - 1), rng.randrange(n - 1)
    b, d = rng.randint(a + 1, m), rng.randint(c + 1, n)
    step, row, width = rng.randint(2, 3), rng.randrange(m), rng.randint(1, n - c)
    choices: list[tuple[str, View]] = [
        ("whole", lambda t: t),
        (f"[..., {a}:{b}, {c}:{d}]", lambda t: t[..., a:b, c:d]),
        (f"[..., {a}::{step}, :]", lambda t: t[..., a::step, :]),
        (f"[..., {-row - 1}, {c}:]", lambda t: t[..., -row - 1, c:]),
        (f"[..., {c}::{step}].transpose", lambda t: t[..., c::step].transpose(-1, -2)),
        (f"narrow({c}, {width})", lambda t: t.narrow(-1, c, width)),
        ("diagonal", lambda t: t.diagonal(0, -2, -1)),
        (f"chunk[{a % 2}]", lambda t: t.chunk(2, -2)[a % 2] if not t.requires_grad else t[..., : m // 2, :]),
        ("flat", lambda t: t.view(*t.shape[:-2], -1)[..., c : c + n]),
        (f"unsqueeze[..., {b - 1}]", lambda t: t.unsqueeze(0).select(-2, b - 1)),
    ]
    if n % 2 == 0:
        choices.append(("split axis", lambda t: t.unflatten(-1, (2, n // 2))[..., 1, :]))
    if len(shape) > 2:
        first = rng.randrange(shape[0])
        choices += [
            (f"[{first}]", lambda t: t[first]),
            ("heads folded", lambda t: t.view(-1, m, n)[1:, :, c:]),
            ("permuted", lambda t: t.permute(*range(1, t.dim()), 0)[1:]),
        ]
    return rng.choice(choices)


def draw_edit(rng: random.Random, shape: Sequence[int], low: float) -> tuple[str, Edit]:
    """Something done in place to a tensor of ``shape``. ``low``: what stands for a masked score."""
    c, other = rng.choice((0.5, -1.25, 2.0)), tensor(rng.randrange(1000), *shape)
    every_other = other[..., ::2].clone()

    def places(t: Tensor) -> Tensor:
        return torch.arange(0, t.shape[-1], 2)

    def assigned(t: Tensor) -> None:
        t[..., 1:] = other[..., 1:]

    def augmented(t: Tensor) -> None:
        t[..., :2] += other[..., :2]

    def masked(t: Tensor) -> None:
        t[other > 0] = low

    choices: list[tuple[str, Edit]] = [
        (f"add_({c})", lambda t: t.add_(c)),
        ("add_(tensor)", lambda t: t.add_(other)),
        ("sub_(tensor, alpha)", lambda t: t.sub_(other, alpha=2)),
        (f"mul_({c})", lambda t: t.mul_(c)),
        (f"div_({c})", lambda t: t.div_(c)),
        (f"fill_({c})", lambda t: t.fill_(c)),
        ("zero_", lambda t: t.zero_()),
        ("copy_", lambda t: t.copy_(other)),
        ("masked_fill_", lambda t: t.masked_fill_(other > 0.3, low)),
        ("masked_fill_(causal)", lambda t: t.masked_fill_(later(t), low)),
        ("tanh_", lambda t: t.tanh_()),
        ("clamp_", lambda t: t.clamp_(-1.5, 0.75)),
        ("index_fill_", lambda t: t.index_fill_(-1, places(t), c)),
        ("index_copy_", lambda t: t.index_copy_(-1, places(t), every_other)),
        ("index_add_", lambda t: t.index_add_(-1, places(t), every_other)),
        ("le_", lambda t: t.le_(other)),
        ("[..., 1:] = tensor", assigned),
        ("[..., :2] += tensor", augmented),
        ("[mask] = low", masked),
    ]
    return rng.choice(choices)


def later(t: Tensor) -> Tensor:
    """Whether the last axis is past the one before it."""
    rows = torch.arange(t.shape[-2])[:, None] if t.dim() > 1 else torch.tensor(0)
    return torch.arange(t.shape[-1]) > rows


@dataclass(frozen=True)
class Program:
    """A sequence of edits of one tensor, each through a view of its own."""

    steps: tuple[tuple[str, View, Edit], ...]

    @classmethod
    def draw(cls, rng: random.Random, shape: Sequence[int], length: int, low: float = -1e9) -> Program:
        steps = []
        for _ in range(length):
            view, at = draw_view(rng, shape)
            edit, do = draw_edit(rng, at(torch.empty(*shape)).shape, low)
            steps.append((f"{view}.{edit}", at, do))
        return cls(tuple(steps))

    def run(self, t: Tensor) -> None:
        for _, view, edit in self.steps:
            edit(view(t))

    def __str__(self) -> str:
        return "; ".join(name for name, _, _ in self.steps)
