"""Host side of the flash kernels: checks shapes, allocates, picks blocks, launches. Knows nothing of autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnfx.lowering import decode
from attnfx.lowering.band_launch import launched, suited
from attnfx.lowering.bands import Arguments as Band
from attnfx.lowering.configs import Config, Kernel, default, fitted, listed, opened, padded, relieved, target_of
from attnfx.lowering.descriptors import describe, serves
from attnfx.lowering.launch import recorded_target, run
from attnfx.lowering.operands import check
from attnfx.lowering.templates.bias_gradient import flash_bias_gradient
from attnfx.lowering.templates.delta import flash_delta
from attnfx.lowering.templates.flash_backward import flash_key_gradient, flash_query_gradient
from attnfx.lowering.templates.flash_forward import flash_forward


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

    @property
    def open(self) -> bool:
        """Whether nothing is masked or weighted."""
        return self.keep is None and self.weight is None

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


def forward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Config | None = None,
    blocks: Tensor | None = None,
    band: Band | None = None,
) -> tuple[Tensor, Residuals]:
    """O (B,H,M,DV) in v's dtype, laid out (B,M,H,DV), and the residuals, from q (B,H,M,D), k (B,HK,N,D), v (B,HK,N,DV).

    Any strides; H a multiple of HK; head dimensions 1 to 256; one dtype of fp16, bf16, fp32. `seed` is an int64 tensor
    of one element, needed where dropout_p > 0; `blocks` lists the tiles that the mask keeps, by rows (`blocks.py`); `band` is
    added to the dots (`bands.py`). Raises ValueError for what the kernels do not carry.
    """
    launch = _Launch.of("forward", program, q, k, v, loads, ints, dropout_p, seed, config, False, blocks, band is not None)
    out = q.new_empty((launch.batch, launch.m, launch.heads, launch.dv), dtype=v.dtype).transpose(1, 2)
    residuals = launch.new_residuals()
    if launch.empty:
        out.fill_(math.nan if program.exact_rows and not program.empty_zero else 0.0)
        residuals.lse.fill_(-math.inf)
        residuals.row_max.fill_(-math.inf)
        residuals.row_sum.fill_(-1.0)
        residuals.degenerate.fill_(1)
        return out, residuals
    if config is None and program.weight is None and band is None and decode.serves(launch.m, launch.n):
        decode.launch(launch, program, q, k, v, out, residuals)
        return out, residuals
    r = residuals
    queries, keys, values, _, tma = launch.streamed(q, k, v)
    with launch.device:
        run(
            flash_forward, launch.row_grid, queries, keys, values, out, r.lse, r.row_max, r.row_sum, r.degenerate, launch.seed,
            q.stride(), k.stride(), v.stride(), out.stride(), *launch.scalars, launch.lists, *launch.second(band),
            KV_RANGE=program.kv_range,
            FLOOR=program.floor, CEILING=program.ceiling, EMPTY_ZERO=program.empty_zero,
            TMA=tma, LISTS=blocks is not None, **launch.even, **launch.switches,
        )  # fmt: skip
    return out, residuals


def backward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    grad_lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    query_config: Config | None = None,
    key_config: Config | None = None,
    row_blocks: Tensor | None = None,
    key_blocks: Tensor | None = None,
    band: Band | None = None,
    grad_left: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous and in their dtypes, from forward's results and dO (B,H,M,DV), any strides.

    `grad_lse` (B,H,M) is the gradient of the natural LSE, None for zero; `row_blocks`, `key_blocks` list the tiles that the mask
    keeps, by rows and by keys. `grad_left`, contiguous, takes the gradient of the rows of a `band` that are not the queries.
    Deterministic: no atomics.
    """
    second = band is not None
    rows = _Launch.of("query_gradient", program, q, k, v, loads, ints, dropout_p, seed, query_config, False, row_blocks, second)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if rows.empty:
        for grad in grads:
            grad.zero_()
        return grads
    keys = _Launch.of("key_gradient", program, q, k, v, loads, ints, dropout_p, seed, key_config, False, key_blocks, second)
    grad_q, grad_k, grad_v = grads
    *by_rows, rows_tma = rows.streamed(q, k, v, grad_out)
    *by_keys, keys_tma = keys.streamed(q, k, v, grad_out)
    with rows.device:
        stats = _statistics(rows, out, residuals, grad_out, grad_lse)
        run(
            flash_query_gradient, rows.row_grid, *by_rows, grad_q, stats, rows.seed, q.stride(),
            k.stride(), v.stride(), grad_out.stride(), grad_q.stride(), *rows.scalars, rows.lists,
            *rows.second(band), grad_left, SCORE_GRAD=program.score_grad, KV_RANGE=program.kv_range, TMA=rows_tma,
            LISTS=row_blocks is not None, **rows.even, **rows.switches,
        )  # fmt: skip
        run(
            flash_key_gradient, keys.key_grid, *by_keys, grad_k, grad_v, stats, keys.seed, q.stride(),
            k.stride(), v.stride(), grad_out.stride(), grad_k.stride(), grad_v.stride(), *keys.scalars, keys.lists,
            *keys.second(band), SCORE_GRAD=program.score_grad, Q_RANGE=program.q_range, TMA=keys_tma,
            LISTS=key_blocks is not None, **keys.even, **keys.switches,
        )  # fmt: skip
    return grads


BiasKind = Literal["tile", "column", "diagonal"]
BIAS_KINDS: tuple[BiasKind, ...] = ("tile", "column", "diagonal")


def bias_gradient(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    kind: BiasKind,
    batch_broadcast: bool,
    head_broadcast: bool,
    inside: bool = False,
    grad_lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Config | None = None,
    blocks: Tensor | None = None,
    band: Band | None = None,
) -> Tensor:
    """Gradient, fp32, of a side tensor that is added with weight 1 to the natural logits, or to the raw dots if `inside`;
    BB is 1 or B, BH is 1 or H; `blocks` lists the tiles that the mask keeps, by rows.

    tile      (BB,BH,M,N), indexed [b, h, i, j]
    column    (BB,BH,N), indexed [b, h, j]
    diagonal  (BB,BH,M+N-1), indexed [b, h, i - j + N - 1]; BLOCK_M must equal BLOCK_N
    Deterministic: no atomics.
    """
    kernel: dict[str, Kernel] = {"tile": "tile_bias", "column": "column_bias", "diagonal": "diagonal_bias"}
    square, second = kind == "diagonal", band is not None
    launch = _Launch.of(kernel[kind], program, q, k, v, loads, ints, dropout_p, seed, config, square, blocks, second)
    m, n, block = launch.m, launch.n, launch.config.block_n
    row_tiles, key_tiles = -(-m // launch.config.block_m), -(-n // block)
    owners = 1 if batch_broadcast else launch.batch, 1 if head_broadcast else launch.heads
    shape, slots = {
        "tile": ((*owners, m, n), row_tiles * key_tiles),
        "column": ((*owners, n), key_tiles),
        "diagonal": ((2, *owners, (row_tiles + key_tiles) * block), row_tiles + key_tiles - 1),
    }[kind]
    if launch.empty:
        return q.new_zeros(shape if kind != "diagonal" else (*owners, max(m + n - 1, 0)), dtype=torch.float32)
    # the two halves of the diagonal sums each leave one end unwritten
    grad = (q.new_zeros if kind == "diagonal" else q.new_empty)(shape, dtype=torch.float32)
    with launch.device:
        stats = _statistics(launch, out, residuals, grad_out, grad_lse)
        run(
            flash_bias_gradient, (slots * owners[0] * owners[1],), q, k, v, grad_out, grad, stats, launch.seed,
            q.stride(), k.stride(), v.stride(), grad_out.stride(), *launch.scalars, launch.lists, launch.batch,
            *launch.second(band),
            KV_RANGE=program.kv_range, KIND=kind, BATCH_BROADCAST=batch_broadcast, HEAD_BROADCAST=head_broadcast,
            SCORE_GRAD=program.score_grad if inside else None, LISTS=blocks is not None, **launch.switches,
        )  # fmt: skip
    if kind == "diagonal":
        first = key_tiles * block - (n - 1)
        return (grad[0] + grad[1])[..., first : first + m + n - 1]
    return grad


def _statistics(
    launch: _Launch, out: Tensor, residuals: Residuals, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """(lse, delta, row_max, row_sum, degenerate), with delta (B,H,M) fp32 computed here; the GPU is already current."""
    delta = torch.empty_like(residuals.lse)
    block_m = max(16, 2048 // padded(launch.dv))
    run(
        flash_delta, (-(-launch.m // block_m) * launch.batch * launch.heads,), out, grad_out,
        delta if grad_lse is None else grad_lse.float().contiguous(), delta, out.stride(), grad_out.stride(),
        launch.heads, launch.m, HAS_GRAD_LSE=grad_lse is not None, DV=launch.dv, BLOCK_M=block_m,
        BLOCK_DV=padded(launch.dv),
    )  # fmt: skip
    r = residuals
    return r.lse, delta, r.row_max, r.row_sum, r.degenerate


@dataclass(frozen=True)
class _Launch:
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
    ) -> _Launch:
        check(q, k, v, dropout_p, seed)
        (batch, heads, m, d), (n, dv) = q.shape, v.shape[2:]
        group = heads // max(k.shape[1], 1)
        exact = program.exact_rows
        target = recorded_target() or target_of(q.device)
        usual = default(kernel, q.dtype, d, dv, target)
        if kernel == "forward" and program.open and dropout_p == 0.0 and q.dtype != torch.float32:
            usual = opened(usual, d, dv, target)
        if second:
            usual, square = suited(kernel, q.dtype, d, dv, target), True
        chosen = config or fitted(usual if program.weight is None else relieved(usual), m, n)
        if blocks is not None:
            chosen = listed(kernel, chosen, target)
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
        return _Launch(
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

    def second(self, band: Band | None) -> tuple[Any, Any, Any]:
        """What the kernels are given of a band."""
        return launched(band, self.config, recorded_target() or target_of(self.like.device))

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
            return Residuals(lse, none, none.clone(), self.like.new_empty(0, dtype=torch.int32))
        flags = self.like.new_zeros(shape[:2], dtype=torch.int32)
        return Residuals(lse, torch.empty_like(lse), torch.empty_like(lse), flags)
