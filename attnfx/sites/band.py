"""Bands: a second product inside the scores, of a vector of each query with one of each distance.

    q_i . k_j  +  factor * u_i . w_(j - i)         w_(j - i) = right[row(i - j)], or zero where the band does not keep

Music Transformer (arXiv:1809.04281) and Transformer-XL (arXiv:1901.02860) shift ``u @ right^T`` by padding and a view, BERT's
relative keys gather the vectors first; either way the model forms a tensor of queries times keys, or distances. A band is
computed from ``window``, the vectors in the order of j - i, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import INDEX, Expr

I, J = INDEX["i"], INDEX["j"]


@dataclass(frozen=True)
class Band:
    """What :class:`attnfx.expr.Score` holds besides q.k: ``factor`` times the product of ``left`` and ``right``.

    ``left``: the slot of a tensor (B,H,M,W), or None for the queries; ``right``: the slot of a tensor (1 or B, 1 or H, L, W).
    ``row`` is the place in L, and ``keep`` whether there is a product: both are functions of i - j. ``dtype``: what the model
    rounds the product to.
    """

    left: int | None
    right: int
    row: Expr
    width: int
    keep: Expr = expr.TRUE
    factor: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def rounds(self) -> bool:
        """Whether the model keeps the product in half precision."""
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def slots(self) -> tuple[int, ...]:
        """The side tensors that it reads."""
        return (self.right,) if self.left is None else (self.left, self.right)

    @property
    def objections(self) -> tuple[str, ...]:
        """What of it is no function of i - j alone, one sentence each."""
        shifted = {I: I + 1, J: J + 1}
        return tuple(
            f"the {name} of a band is {e}, no function of i - j."
            for name, e in (("row", self.row), ("mask", self.keep))
            if expr.substitute(e, shifted) != e or expr.depends_on(e, "b", "h")
        )


def distances(queries: Any, keys: Any) -> Any:
    """How many distances j - i there are, from 1 - queries to keys - 1: the rows of a window."""
    return queries + keys - 1


def window(band: Band, right: Tensor, queries: Any, keys: Any, values: Mapping[sympy.Symbol, int]) -> Tensor:
    """(1 or B, 1 or H, M + N - 1, W): row j - i + M - 1 is what a query i multiplies for key j, zero where there is no product.
    Differentiable in ``right``."""
    from attnfx.algebra.evaluate import evaluate

    ahead = torch.arange(distances(queries, keys), device=right.device) - (queries - 1)
    zero = torch.zeros((), dtype=torch.int64, device=right.device)
    grid = {"b": zero, "h": zero, "i": -ahead, "j": zero}
    rows = evaluate(band.row, grid, (), values).clamp(0, right.shape[2] - 1)
    made = right.index_select(2, rows)
    if band.keep == expr.TRUE:
        return made
    kept = evaluate(band.keep, grid, (), values)
    return torch.where(kept[:, None], made, made.new_zeros(()))


def skewed(products: Tensor, columns: int) -> Tensor:
    """A view (..., R, C) of contiguous (..., R, R + C - 1): element r, c is that of column c - r + R - 1."""
    *lead, rows, width = products.shape
    strides = products.stride()
    return products.as_strided((*lead, rows, columns), (*strides[:-2], width - 1, 1), products.storage_offset() + max(rows - 1, 0))


def rounded(product: Tensor, band: Band) -> Tensor:
    """A product as the score has it: times its factor, rounded as the model rounds it. float64 is an oracle's, and stays."""
    scaled = product if band.factor == 1.0 else product * band.factor
    return scaled.to(band.dtype).to(product.dtype) if band.rounds and product.dtype == torch.float32 else scaled


def dense(band: Band, q: Tensor, keys: int, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int]) -> Tensor:
    """The whole band (B,H,M,N) in the dtype of ``q`` (B,H,M,D): the plain meaning, with tensors of M * (M + N) elements."""
    left = q if band.left is None else loads[band.left].to(q.dtype)
    rows = window(band, loads[band.right].to(q.dtype), q.shape[2], keys, values)
    products = left @ rows.transpose(-1, -2)
    i, j = torch.arange(q.shape[2], device=q.device), torch.arange(keys, device=q.device)
    at = (j - i[:, None] + q.shape[2] - 1).expand(*products.shape[:2], -1, -1)
    return rounded(products.gather(-1, at), band)
