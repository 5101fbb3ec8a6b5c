"""The rows of `benchmarks.kernels`: attention in bfloat16 by mask, length and width, as a formula and as a model spells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from attnfx import expr
from attnfx.expr import Expr, Load, Score

H, I, J = (expr.index(name) for name in "hij")
CAUSAL = expr.le(J, I)
TOKENS = 16_384
LENGTHS = (2048, 8192, 16_384, 32_768)
CUTS = (0.0, 0.03, 0.08, 0.16, 0.3, 0.42, 0.6, 0.85, 1.0)  # where documents begin and end, as parts of the whole
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Form:
    """An attention without its sizes.

    ``formula``: score and mask of the generated kernel, from a row and the tensors beside q, k and v; None: it has no softmax, and
    no kernel. ``keep(row, i, j, *loads)``: the mask of tensors of positions. ``bias(row, q, *loads)``: what is added to the scores.
    ``loads``: the tensors beside q, k and v. ``pairs``: how many pairs of query and key are kept. ``plain``: whether torch's own
    attention says the same by a flag; ``data``: whether the mask reads tensors. ``learned``: which of ``loads`` have gradients.
    """

    formula: Callable[[Row, tuple[Tensor, ...]], tuple[Expr, Expr]] | None
    pairs: Callable[[Row], int]
    keep: Callable[..., Tensor] | None = None
    bias: Callable[..., Tensor] | None = None
    loads: Callable[[Row, str], tuple[Tensor, ...]] = lambda row, device: ()
    plain: bool = False
    data: bool = False
    learned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of measurements. ``without``: peers that are timed only if they are asked for by name; ``targets``: how many times
    as fast as a peer attnfx's chosen path is to be."""

    name: str
    form: Form
    length: int
    width: int = 128
    batch: int = 1
    heads: int = 16
    key_heads: int = 16
    window: int = 0
    side: int = 7
    backward: bool = False
    without: tuple[str, ...] = ()
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    @property
    def flops(self) -> int | None:
        """Of the products of queries, keys and values that the mask keeps; a backward has five where the forward has two."""
        if self.form.formula is None:
            return None
        forward = 4 * self.form.pairs(self) * self.batch * self.heads * self.width
        return forward * 7 // 2 if self.backward else forward

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """q (B,H,S,D), k and v (B,Hk,S,D), laid out as a projection gives them, (B,S,H,D); then what the form loads."""
        noise = torch.Generator(device).manual_seed(0)
        shapes = [(self.batch, self.length, heads, self.width) for heads in (self.heads, self.key_heads, self.key_heads)]
        made = (torch.randn(s, device=device, dtype=torch.bfloat16, generator=noise).transpose(1, 2) for s in shapes)
        return (*made, *self.form.loads(self, device))

    def keep(self, i: Tensor, j: Tensor, *loads: Tensor) -> Tensor | None:
        """The mask at tensors of positions; None where everything is kept."""
        return None if self.form.keep is None else self.form.keep(self, i, j, *loads)

    def model(self, q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> Tensor:
        """The model's spelling, laid out as its output projection reads it, (B,S,H,D)."""
        return self.eager(q, k, v, *loads).transpose(1, 2).contiguous()

    def repeated(self, t: Tensor) -> Tensor:
        """Keys or values with a head for each query head."""
        return t if self.key_heads == self.heads else t.repeat_interleave(self.heads // self.key_heads, 1)

    def eager(self, q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> Tensor:
        """The model's spelling, mask included."""
        at = torch.arange(q.shape[2], device=q.device)
        keep = self.keep(at[:, None], at[None, :], *loads)
        if self.form.data:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.rows_of(q, self.repeated(k), self.repeated(v), keep, self.added(q, *loads))

    def added(self, q: Tensor, *loads: Tensor) -> Tensor | None:
        return None if self.form.bias is None else self.form.bias(self, q, *loads)

    def rows_of(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, bias: Tensor | None) -> Tensor:
        """Some rows of it, in two products."""
        scores = q @ k.transpose(-1, -2) * self.scale
        if bias is not None:
            scores = scores + bias
        if self.form.formula is None:
            return (scores if keep is None else scores.masked_fill(~keep, 0.0)) @ v
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        return scores.softmax(-1, dtype=None if q.dtype == torch.float64 else torch.float32).to(q.dtype) @ v


def _score(row: Row) -> Expr:
    return Score() * row.scale


def _full(row: Row) -> int:
    return row.length * row.length


def _causal_pairs(length: int, window: int) -> int:
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


def _window(row: Row, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < row.window)


def _ends(row: Row) -> list[int]:
    return [round(cut * row.length) for cut in CUTS]


def _documents(row: Row, device: str) -> tuple[Tensor]:
    """The number of each token's document."""
    ids = torch.zeros(row.length, dtype=torch.int64, device=device)
    for end in _ends(row)[1:-1]:
        ids[end:] += 1
    return (ids,)


def _table(row: Row, device: str) -> tuple[Tensor, Tensor]:
    """A number for each head and distance in a window of side x side, and where it stands for each pair."""
    side, noise = row.side, torch.Generator(device).manual_seed(1)
    table = torch.randn((2 * side - 1) ** 2, row.heads, device=device, dtype=torch.bfloat16, generator=noise)
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    away = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + side - 1
    return table, (away[..., 0] * (2 * side - 1) + away[..., 1]).to(device)


def _swin(row: Row, loads: tuple[Tensor, ...]) -> tuple[Expr, Expr]:
    bias = Load(0, (Load(1, (I, J), torch.int64), H), loads[0].dtype)
    return _score(row) + expr.cast(bias, torch.float32), expr.TRUE


def _from_table(row: Row, q: Tensor, table: Tensor, places: Tensor) -> Tensor:
    n = row.side**2
    return table[places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()[None]


FULL = Form(lambda row, loads: (_score(row), expr.TRUE), _full, plain=True)
CAUSALLY = Form(
    lambda row, loads: (_score(row), CAUSAL),
    lambda row: _causal_pairs(row.length, row.length),
    keep=lambda row, i, j: j <= i,
    plain=True,
)
WINDOW = Form(
    lambda row, loads: (_score(row), expr.logical_and(CAUSAL, expr.lt(I - J, expr.integer(row.window)))),
    lambda row: _causal_pairs(row.length, row.window),
    keep=_window,
)
DOCUMENTS = Form(
    lambda row, loads: (
        _score(row), expr.logical_and(CAUSAL, expr.eq(Load(0, (I,), torch.int64), Load(0, (J,), torch.int64)))
    ),
    lambda row: sum(_causal_pairs(b - a, b - a) for a, b in pairwise(_ends(row))),
    keep=lambda row, i, j, ids: (j <= i) & (ids[i] == ids[j]),
    loads=_documents,
    data=True,
)  # fmt: skip
SWIN = Form(_swin, _full, bias=_from_table, loads=_table, learned=(0,))
GIVEN = Form(  # with a bias (1,H,S,S) that is there
    lambda row, loads: (
        _score(row) + expr.cast(Load(0, (expr.integer(0), H, I, J), loads[0].dtype), torch.float32), expr.TRUE
    ),
    _full,
    learned=(0,),
)  # fmt: skip
LINEAR = Form(None, _full, keep=lambda row, i, j: j <= i)


def _plain() -> list[Row]:
    """Causal and full at all lengths. FlexAttention and torch.compile take longer to compile than all else takes, so they stand
    where their line is seen: at all lengths once, of causal attention, and elsewhere at one."""
    found = []
    for form, mask in ((CAUSALLY, "causal"), (FULL, "full")):
        for width in (128, 64):
            for length in LENGTHS:
                slow = () if length <= 8192 else ("efficient",)
                lone = () if length == 8192 else ("flex", "compiled") if (mask, width) != ("causal", 128) else ()
                name = f"{mask}-d{width}-{length // 1024}k"
                batch = max(1, TOKENS // length)
                found.append(Row(name, form, length, width, batch, without=(*slow, *lone)))
    return found


_FORWARD = (
    *_plain(),
    Row("window-8k", WINDOW, 8192, batch=2, window=1024),
    Row("window-64k", WINDOW, 65_536, window=4096),
    Row("documents-16k", DOCUMENTS, 16_384),
    Row("gqa-8k", CAUSALLY, 8192, batch=2, heads=32, key_heads=8),
    Row("short-causal", CAUSALLY, 512, 64, batch=8),
    Row("short-full", FULL, 512, 64, batch=8),
    Row("swin-49", SWIN, 49, 32, batch=1024, heads=6, key_heads=6, targets={"compiled": 1.2}),
    Row("linear-d64-8k", LINEAR, 8192, 64, batch=2),
    Row("linear-d128-8k", LINEAR, 8192, 128, batch=2),
)
ROWS = tuple(
    both
    for row in _FORWARD
    for both in (row, replace(row, name=f"{row.name}-backward", backward=True, targets={}))
)  # fmt: skip


def quick(row: Row) -> Row:
    """A tiny row of the same form."""
    length = row.length if row.form is SWIN else max(64, row.length // 64)
    group = row.heads // row.key_heads
    return replace(
        row, length=length, batch=min(row.batch, 2), heads=2 * group, key_heads=2, window=row.window // 64, targets={}
    )  # fmt: skip
