"""Masks and biases that models make of positions by unusual operations: described without a tensor of queries by keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same, compiled
from torch import Tensor

SIZE = 12


def points() -> Tensor:
    """(SIZE, 2): places of a grid four wide."""
    return torch.stack([torch.arange(SIZE) // 4, torch.arange(SIZE) % 4], -1)


def swin() -> Tensor:
    """The relative place of two pixels, one number for each."""
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")).flatten(1)
    apart = (grid[:, :, None] - grid[:, None]).permute(1, 2, 0)
    return (apart + torch.tensor([2, 3])).mul(torch.tensor([7, 1])).sum(-1).float()


MASKS: dict[str, Callable[[], Tensor]] = {
    "disc of a grid": lambda: ((points()[:, None] - points()[None]) ** 2).sum(-1) <= 4,
    "square of a grid": lambda: (points()[:, None] - points()[None]).abs().amax(-1) <= 1,
    "row or column": lambda: (points()[:, None] == points()[None]).any(-1),
    "negative distance": lambda: -torch.cdist(points().float(), points().float()),
    "manhattan": lambda: (points()[:, None] - points()[None]).abs().sum(-1) * -0.5,
    "swin index": swin,
    "butterfly": lambda: ((torch.arange(SIZE)[:, None] ^ torch.arange(SIZE)) & (SIZE - 1)) <= 3,
    "same digit": lambda: F.one_hot(torch.arange(SIZE) % 3, 3).float() @ F.one_hot(torch.arange(SIZE) % 3, 3).float().T > 0,
    "sliding view": lambda: torch.arange(2 * SIZE - 1).flip(0).unfold(0, SIZE, 1).float() * 0.1,
    "strided": lambda: torch.arange(2 * SIZE).as_strided((SIZE, SIZE), (1, 1)).float() * 0.1,
    "chosen distances": lambda: torch.isin(torch.arange(SIZE)[:, None] - torch.arange(SIZE), torch.tensor([0, 1, 2, 4, 8])),
    "buckets": lambda: torch.bucketize(torch.arange(SIZE)[:, None] - torch.arange(SIZE), torch.tensor([-4, 0, 1, 5])).float(),
    "blocks": lambda: torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).bool(),
    "chunks counted": lambda: (
        (torch.arange(SIZE) % 4 == 0).cumsum(0)[:, None] == (torch.arange(SIZE) % 4 == 0).cumsum(0)
    ),
    "log of the distance": lambda: -torch.log1p((torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs().float()),
    "rolled window": lambda: (torch.arange(SIZE)[:, None] // 4 == torch.arange(SIZE) // 4).roll((2, 2), (0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_it_is_a_formula(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[name]())

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, SIZE, 8) for _ in range(3))
    got, report = compiled(attend, q, k, v)
    assert [m.reason for m in report.missed] == []
    (found,) = report.sites
    assert found.rewritten, found
    assert [tensor for tensor in found.site.side if len(tensor.shape) > 1] == []
    assert_same(got, attend(q, k, v))


def test_chunks_are_bounded() -> None:
    """What a query can see is known in closed form, and it is never nothing."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=at[:, None] // 4 == at // 4)

    q, k, v = (torch.randn(2, 2, SIZE, 8) for _ in range(3))
    got, report = compiled(attend, q, k, v)
    (found,) = report.sites
    assert found.site.facts.nonempty
    assert found.site.facts.keys.low is not None
    assert found.site.facts.keys.high is not None
    assert_same(got, attend(q, k, v))
