"""What every launch of the kernels has in common: the program of a site, and one checked call of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering.band_launch import suited
from attnfx.lowering.checks import check
from attnfx.lowering.configs import (
    Config,
    Kernel,
    bounded,
    default,
    fitted,
    listed,
    narrowed,
    opened,
    padded,
    relieved,
    target_of,
    walked,
)
from attnfx.lowering.descriptors import describe, describe_rows, serves
from attnfx.lowering.launch import recorded_target
from attnfx.lowering.tuning.lookup import tuned
from attnfx.sites.ordering import Order
from attnfx.sites.skipping import Skip


@dataclass(frozen=True)
class Program:
    """The generated functions of one attention site and eager's treatment of the positions that are not kept.

    score       SCORE(dot, b, h, i, j, loads, ints) -> base-2 logits, fp32
    score_grad  SCORE_GRAD(dot, b, h, i, j, loads, ints) -> d(natural logit) / d(dot), fp32
    keep        KEEP(b, h, i, j, loads, ints) -> bool, or None: everything is kept
    coarse      COARSE(dot, b, h, i, j, loads, ints) -> natural logits, fill included, as half precision computes them, for
                rows that have nothing but fills; or None: fp32 means the same
    weight      WEIGHT(b, h, i, j, loads, ints) -> factor of the probabilities after the softmax, fp32, or None: 1
    kv_range    KV_RANGE(i_first, i_last, ints) -> (lo, full_lo, full_hi, hi) of keys, or None: all, none known full
    q_range     the same with the roles of i and j swapped
    fill        what eager puts at a position that is not kept; `additive`: it adds it to the score
    exact_rows  rows may exist that keep nothing, and mean what eager's softmax makes of them (else: O = 0, LSE = -inf)
    hidden      natural logit from which on, in magnitude, a row's maximum is that of a mask added as data: such rows
                keep their maximum and sum apart, since in fp32 their LSE has lost the sum
    empty_zero  with exact_rows: a row without keys gives O = 0 and not NaN
    loaded      a tile of scores reads numbers of its keys
    slope       SCORE_GRAD where it is one number; else None
    pure        with a slope: the natural logits are the dots times it, and nothing else
    narrow      a window keeps few tiles of keys for a query
    skip        which tiles are left out, or None
    place       PLACE(number) -> where that token lies, or None: as it is counted
    corner      CORNER(b, h, number) -> the corner of the box of the tile that begins with that token, or None: tiles are no boxes
    order       what both are made of, or None
    key         names the program where tuned configurations are remembered (`tuning/lookup.py`); "": none are
    """

    score: Any
    score_grad: Any
    keep: Any | None
    kv_range: Any | None
    q_range: Any | None
    fill: float
    additive: bool
    exact_rows: bool
    allow_tf32: bool = False
    hidden: float = -math.inf
    empty_zero: bool = False
    weight: Any | None = None
    coarse: Any | None = None
    loaded: bool = False
    slope: float | None = None
    pure: bool = False
    narrow: bool = False
    skip: Skip | None = None
    place: Any | None = None
    corner: Any | None = None
    order: Order | None = None
    key: str = ""

    @property
    def open(self) -> bool:
        """Whether nothing is masked or weighted."""
        return self.keep is None and self.weight is None

    @property
    def bounded(self) -> bool:
        """Whether the mask is one of formulas that cuts few of the tiles that it keeps, and nothing else is in the way."""
        alone = self.weight is None and self.pure and not self.exact_rows and self.skip is None
        return self.kv_range is not None and not self.narrow and alone

    @property
    def factor(self) -> float | None:
        """The positive number that SCORE multiplies the dots with, where it does nothing else: it keeps their order."""
        return self.slope * math.log2(math.e) if self.pure and self.slope is not None and self.slope > 0.0 else None

    @property
    def floor(self) -> float:
        """Base-2 logit at or below which the largest kept score leaves weight to the fill: exp(-110) is 0 in fp32."""
        floor = max(self.fill + 110.0, self.hidden) * math.log2(math.e)
        return floor if floor > torch.finfo(torch.float32).min else -math.inf

    @property
    def ceiling(self) -> float:
        """Base-2 logit at or above which a row's maximum hides its sum from the LSE."""
        return -self.hidden * math.log2(math.e)


@dataclass(frozen=True)
class Residuals:
    """What backward needs beside O: natural LSE (B,H,M) fp32; and, only with exact_rows, natural row maxima and sums
    (B,H,M) fp32 (sums negated in degenerate rows) and a flag (B,H) int32; else tensors of numel 0."""

    lse: Tensor
    row_max: Tensor
    row_sum: Tensor
    degenerate: Tensor


@dataclass(frozen=True)
class Call:
    """One checked call: sizes, the arguments that all kernels take alike, and where to run."""

    batch: int
    heads: int
    group: int
    m: int
    n: int
    d: int
    dv: int
    exact: bool
    config: Config
    seed: Tensor
    scalars: tuple[Any, ...]
    switches: dict[str, Any]
    like: Tensor
    blocks: Tensor | None

    @staticmethod
    def of(
        kernel: Kernel,
        program: Program,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        loads: Sequence[Tensor],
        ints: Sequence[int],
        dropout_p: float,
        seed: Tensor | None,
        config: Config | None,
        square: bool = False,
        blocks: Tensor | None = None,
        second: bool = False,
    ) -> Call:
        check(q, k, v, dropout_p, seed)
        (batch, heads, m, d), (n, dv) = q.shape, v.shape[2:]
        group = heads // max(k.shape[1], 1)
        exact = program.exact_rows
        target = recorded_target() or target_of(q.device)
        usual = default(kernel, q.dtype, d, dv, target)
        if kernel == "forward" and program.open and dropout_p == 0.0 and q.dtype != torch.float32:
            usual = opened(usual, d, dv, target, program.loaded)
        if kernel == "forward" and program.bounded and dropout_p == 0.0 and blocks is None and q.dtype != torch.float32:
            usual = bounded(usual, d, dv, target)
        if program.narrow and q.dtype != torch.float32:
            usual = narrowed(kernel, usual, d, dv, target)
        if blocks is not None and kernel == "forward" and q.dtype != torch.float32:
            usual = walked(usual, d, dv, target)
        if second:
            usual, square = suited(kernel, q.dtype, d, dv, target), True
        chosen = config or tuned(kernel, program.key, q, k, v, blocks is not None, dropout_p > 0.0)
        chosen = chosen or fitted(usual if program.weight is None else relieved(usual), m, n)
        if blocks is not None:
            chosen = listed(kernel, chosen)
        if square:
            chosen = replace(chosen, block_m=chosen.block_n)
        switches = {
            "SCORE": program.score,
            "KEEP": program.keep,
            "WEIGHT": program.weight,
            "FILL": program.fill,
            "ADDITIVE": program.additive,
            "COARSE": program.coarse,
            "EXACT_ROWS": exact,
            "DROPOUT": dropout_p > 0.0,
            "D": d,
            "DV": dv,
            "PRECISION": "tf32" if program.allow_tf32 and q.dtype == torch.float32 else "ieee",
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_D": padded(d),
            "BLOCK_DV": padded(dv),
            "STAGES": chosen.num_stages,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        }
        # an empty tuple has no type to compile for
        scalars = (tuple(loads) or (q,), tuple(ints) or (0,), heads, group, m, n, float(dropout_p))
        return Call(
            batch, heads, group, m, n, d, dv, exact, chosen, q if seed is None else seed, scalars, switches, q, blocks,
        )  # fmt: skip

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.heads, self.m, self.n)

    def streamed(self, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None = None) -> tuple[Any, ...]:
        """(q, k, v, grad_out, whether by descriptors): the tensors, or descriptors of their tiles where all can have one."""
        target, c = recorded_target() or target_of(self.like.device), self.config
        tensors = [x for x in (q, k, v, grad_out) if x is not None]
        if not (c.tma and all(serves(target, x) for x in tensors)):
            return q, k, v, grad_out, False
        tiles = ((c.block_m, self.d), (c.block_n, self.d), (c.block_n, self.dv), (c.block_m, self.dv))
        described = [describe(x, rows, padded(width)) for x, (rows, width) in zip(tensors, tiles, strict=False)]
        return *described, *([grad_out] if grad_out is None else []), True

    def walked(self, numbers: Tensor, by_descriptors: bool) -> Any:
        """The descriptor of numbers (2,B,H,M) of rows that a kernel walks over; None where pointers are to be read."""
        if not by_descriptors or not self.even["EVEN_M"]:
            return None
        return describe_rows(numbers.flatten(1, 2), self.config.block_m)

    @property
    def even(self) -> dict[str, bool]:
        """Whether tiles end where the queries and the keys end."""
        return {"EVEN_M": self.m % self.config.block_m == 0, "EVEN_N": self.n % self.config.block_n == 0}

    @property
    def lists(self) -> tuple[Any, ...] | None:
        """The lists of tiles with their strides of batch, head and list; an axis of one serves all."""
        if self.blocks is None:
            return None
        batch, head, stride, _ = self.blocks.stride()
        return self.blocks, batch * (self.blocks.shape[0] > 1), head * (self.blocks.shape[1] > 1), stride

    @property
    def row_grid(self) -> tuple[int]:
        return (-(-self.m // self.config.block_m) * self.batch * self.heads,)

    @property
    def key_grid(self) -> tuple[int]:
        return (-(-self.n // self.config.block_n) * self.batch * (self.heads // self.group),)

    @property
    def device(self) -> AbstractContextManager[None]:
        """Makes the tensors' GPU current: Triton launches on the current one."""
        return torch.cuda.device(self.like.device) if self.like.is_cuda else nullcontext()

    def new_residuals(self) -> Residuals:
        shape = (self.batch, self.heads, self.m)
        lse = self.like.new_empty(shape, dtype=torch.float32)
        if not self.exact:
            none = self.like.new_empty(0, dtype=torch.float32)
            return Residuals(lse, none, self.like.new_empty(0, dtype=torch.float32), self.like.new_empty(0, dtype=torch.int32))
        flags = self.like.new_zeros(shape[:2], dtype=torch.int32)
        return Residuals(lse, torch.empty_like(lse), torch.empty_like(lse), flags)
