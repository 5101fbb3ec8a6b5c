"""A bias as products of a number of the query and a number of the key, from its singular values, and how exact that is.

    bias(h, i, j)  ~  row(h, i) + sum_r u_r(h, i) * v_r(g(h), j)

The softmax of a row does not see what all its keys share. So the mean of each row is taken out first, and what counts is the
largest error of what is left, in logits: not the energy, of which a constant may have nearly all and the softmax sees nothing.
Query heads that share a key head g share its v: their rows are factored together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Further singular vectors of the subspace that is iterated, iterations, and when all of them are computed instead.
_MORE, _ITERATIONS, _PART = 12, 12, 4


@dataclass(frozen=True, eq=False)
class Factors:
    """``query`` (H, M, C) and ``key`` (HK, N, C), whose products over C stand for a bias (H, M, N) divided by a scale of each head;
    C is :func:`columns` of the highest rank.

    ``ranks``: of each key head; ``errors``: of each query head, the largest row-centred one in logits, with every rounding.
    """

    query: Tensor
    key: Tensor
    ranks: tuple[int, ...]
    errors: tuple[float, ...]

    @property
    def rank(self) -> int:
        return max(self.ranks, default=0)


def factored(bias: Tensor, key_heads: int, tolerance: float, most: int, dtype: torch.dtype, scale: Tensor | None = None) -> Factors:
    """The factors of ``bias`` (H, M, N) in ``dtype``, each key head of the least rank up to ``most`` within ``tolerance``.

    Where none is, the rank is ``most``. ``scale`` (H): what the kernel multiplies the products of a head by.
    """
    bias = bias.double()
    bias = bias - bias.mean(-1, keepdim=True)
    groups = bias.shape[0] // key_heads
    by = torch.ones(bias.shape[0], dtype=torch.float64, device=bias.device) if scale is None else scale.double()
    found = [
        _factored(part, tolerance, most, dtype, c)
        for part, c in zip(torch.split(bias, groups), torch.split(by, groups), strict=True)
    ]  # fmt: skip
    rank = max(len(us) for us, _, _ in found)
    width = columns(rank, dtype)
    query = bias.new_zeros((*bias.shape[:2], width), dtype=dtype)
    key = bias.new_zeros((key_heads, bias.shape[2], width), dtype=dtype)
    for head, (us, vs, _) in enumerate(found):
        for r, (u, v) in enumerate(zip(us, vs, strict=True)):
            rows = slice(head * groups, (head + 1) * groups)
            for k, (a, b) in enumerate(zip(*_laid(u, v, dtype), strict=True)):
                query[rows, :, r * copies(dtype) + k] = a
                key[head, :, r * copies(dtype) + k] = b
    errors = tuple(e for _, _, each in found for e in each)
    return Factors(query, key, tuple(len(us) for us, _, _ in found), errors)


def copies(dtype: torch.dtype) -> int:
    """Columns for each rank: a half keeps 8 or 11 bits, so that each number is two, and three of their products count."""
    return 3 if dtype.itemsize < 4 else 1


def columns(rank: int, dtype: torch.dtype) -> int:
    """Columns for a rank: a multiple of 16 bytes, so that the rows of queries and keys stay aligned; those left over are zero."""
    each = 16 // dtype.itemsize
    return -(-rank * copies(dtype) // each) * each


def _laid(u: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The columns beside query and key whose products add up to u * v: high * high, high * low, low * high."""
    if copies(dtype) == 1:
        return (u.to(dtype),), (v.to(dtype),)
    (uh, ul), (vh, vl) = ((x.to(dtype), (x - x.to(dtype).double()).to(dtype)) for x in (u, v))
    return (uh, uh, ul), (vh, vl, vh)


def _factored(
    bias: Tensor, tolerance: float, most: int, dtype: torch.dtype, scale: Tensor
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """u (G, M) and v (N) for each rank of centred ``bias`` (G, M, N), and the error of each head that is left."""
    us: list[Tensor] = []
    vs: list[Tensor] = []
    left, factor = bias.clone(), scale[:, None, None]
    left_vectors, right_vectors = _singular(bias.flatten(0, 1), most)
    for r in range(most + 1):
        errors = left.abs().amax((1, 2))
        if r == min(most, left_vectors.shape[1]) or bool((errors <= tolerance).all()):
            break
        u, v = left_vectors[:, r].view(bias.shape[:2]) / scale[:, None], right_vectors[:, r]
        even = (u.abs().amax() / v.abs().amax()).sqrt()  # large and small alike in both, where a half has its finest steps
        u, v = u / even, v * even
        for a, b in zip(*_laid(u, v, dtype), strict=True):
            left -= factor * a.double()[..., None] * b.double()
        us.append(u)
        vs.append(v)
    return us, vs, errors.tolist()


def _singular(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(rows, R), (columns, R): the leading left and right singular vectors, times the roots of their values; zero ones left out."""
    width = most + _MORE
    if width * _PART >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = torch.Generator(device="cpu").manual_seed(0)
        basis = torch.randn(matrix.shape[1], width, generator=start, dtype=matrix.dtype).to(matrix.device)
        for _ in range(_ITERATIONS):  # subspace iteration; Halko, Martinsson and Tropp 2011 (arXiv:0909.4061)
            basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
        left, values, small = torch.linalg.svd(matrix @ basis, full_matrices=False)
        right = small @ basis.T
    known = int((values > 0).sum())
    roots = values[:known].sqrt()
    return left[:, :known] * roots, right[:known].T * roots
