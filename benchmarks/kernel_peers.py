"""The peers of `benchmarks.kernels`: who computes a row's attention, and how each is called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.nn import functional

from attnfx.lowering import blocks, ops
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite, SideTensor
from benchmarks.kernel_rows import GIVEN, Attend, Form, Row

GENERATED, CHOSEN = "generated", "chosen"
OURS = (GENERATED, CHOSEN)
NAMES = (*OURS, "cudnn", "flash", "efficient", "flex", "compiled", "fla", "eager")
DENSE = 16_384  # the longest sequence of which a dense mask is written down
SCORES = 8192  # the longest of which all scores are


@dataclass(frozen=True)
class Made:
    """A peer that is ready. ``setup``: makes what all layers of a model share, and is no part of ``attend``; ``twice``: two layers
    in one call, of a peer that makes what they share inside of the call."""

    attend: Attend
    setup: Callable[[], object] | None = None
    twice: Attend | None = None


Make = Callable[[], Made]


def peers(row: Row, inputs: tuple[Tensor, ...], device: str) -> Iterator[tuple[str, Make]]:
    """Names, and what makes the peer, of all peers that can compute the row on a device."""
    form = row.form
    if form.formula is not None:
        yield GENERATED, lambda: generated(row, inputs, device)
    yield CHOSEN, lambda: chosen(row, device)
    if device == "cpu":
        yield "eager", lambda: Made(_as_read(row.model))
        return
    if form.formula is not None and (form.plain or form.bias is not None or row.length <= DENSE):
        for name in _backends(row):
            yield name, lambda name=name: _vendor(row, inputs, name)  # type: ignore[misc]
    if form.formula is not None and form.bias is None:
        yield "flex", lambda: _flex(row, inputs)
    if row.length <= SCORES:
        yield "compiled", lambda: Made(_as_read(torch.compile(row.model, dynamic=False)))
    if form.formula is None and importlib.util.find_spec("fla") is not None:
        yield "fla", lambda: _fla(row)


def plan_of(row: Row, q: Tensor, loads: tuple[Tensor, ...], device: str) -> KernelPlan:
    """The plan of the row's formula, for generated kernels on a GPU and for torch operations on a CPU. Raises ValueError where
    there is none."""
    if row.form.formula is None:
        raise ValueError(f"{row.name} has no softmax, and no kernel is generated for it")
    score, keep = row.form.formula(row, loads)
    side = tuple(
        SideTensor(tuple(map(sympy.Integer, t.shape)), t.dtype, row.backward and n in row.form.learned) for n, t in enumerate(loads)
    )
    sizes = [sympy.Integer(n) for n in (row.batch, row.heads, row.key_heads, row.length, row.length)]
    site = AttentionSite(
        *sizes, row.width, row.width, q.dtype, device, score, keep, side=side, requires_grad=row.backward,
        empty_rows="zero" if row.form.data else "nan",
    )  # fmt: skip
    plan = make_plan(site, "flash" if device == "cuda" else "portable")
    if not isinstance(plan, KernelPlan):
        raise ValueError(" ".join(plan))
    return plan


def generated(row: Row, inputs: tuple[Tensor, ...], device: str) -> Made:
    """attnfx's generated kernels, whatever attnfx would choose; lists of the tiles that a mask of data keeps are made before."""
    q, k, _, *loads = inputs
    if row.backward and row.form.learned:
        return _with_bias(row, q, loads, device)
    plan = plan_of(row, q, tuple(loads), device)
    text = plan.to_json()
    values = plan.values((), row.length, loads)

    def lists() -> tuple[Tensor | None, Tensor | None]:
        wanted = [t.detach().requires_grad_(row.backward) for t in (q, k)]
        with torch.set_grad_enabled(row.backward):
            return blocks.of_call(text, wanted[0], wanted[1], loads, values)

    if not row.form.data or plan.tables:
        return Made(lambda q, k, v, *loads: ops.attention(q, k, v, loads, (), text))
    ready = lists()

    def attend(q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> Tensor:
        found: Tensor = torch.ops.attnfx.flash(q, k, v, loads, (), None, text, *ready)[0]
        return found

    return Made(attend, lists if ready[0] is not None else None)


def _with_bias(row: Row, q: Tensor, loads: list[Tensor], device: str) -> Made:
    """As attnfx does where no kernel has a learned bias' gradient by its formula: the bias is computed, (1,H,S,S), and loaded."""
    bias = row.added(q, *loads)
    assert bias is not None
    text = plan_of(replace(row, form=GIVEN), q, (bias,), device).to_json()
    return Made(lambda q, k, v, *loads: ops.attention(q, k, v, (row.added(q, *loads),), (), text))  # type: ignore[arg-type]


def chosen(row: Row, device: str) -> Made:
    """What ``torch.compile(eager, backend="attnfx")`` decides. On a CPU the rewritten graph runs without Inductor."""
    from attnfx.backend import attnfx

    def compiled(call: Attend, layers: int = 1) -> Attend:
        options: dict[str, Any] = {"inner": "eager"} if device == "cpu" else {}
        if row.form.formula is not None:
            options["strict_sites"] = layers
        return _as_read(torch.compile(call, backend=attnfx, dynamic=False, fullgraph=True, options=options))

    def two(q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> Tensor:
        return row.model(row.eager(q, k, v, *loads), k, v, *loads)

    return Made(compiled(row.model), twice=compiled(two, layers=2) if row.form.data else None)


def _as_read(model: Attend) -> Attend:
    """A model's (B,S,H,D) as the (B,H,S,D) that others give."""
    return lambda *inputs: model(*inputs).transpose(1, 2)


def _backends(row: Row) -> tuple[str, ...]:
    """Which of torch's own kernels take the row: flash takes no mask, efficient no groups, and cuDNN's bias has no gradient."""
    if row.form.bias is not None:
        return ("efficient",)
    if not row.form.plain:
        return ("cudnn", "efficient")
    return ("cudnn", "flash", "efficient") if row.heads == row.key_heads else ("cudnn", "flash")


def _vendor(row: Row, inputs: tuple[Tensor, ...], name: str) -> Made:
    """scaled_dot_product_attention by one backend: by its flag, or with a dense mask that is made beforehand, or with a bias."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION
    }[name]  # fmt: skip
    form, grouped = row.form, row.heads != row.key_heads

    def dense() -> Tensor:
        at = torch.arange(row.length, device=inputs[0].device)
        keep = row.keep(at[:, None], at[None, :], *inputs[3:])
        assert keep is not None
        low = torch.full((), float("-inf"), dtype=inputs[0].dtype, device=keep.device)
        return torch.where(keep, torch.zeros_like(low), low)[None, None]

    mask = None if form.plain or form.bias is not None else dense()

    def attend(q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=row.added(q, *loads) if mask is None else mask, is_causal=form.plain and form.keep is not None,
                scale=row.scale, enable_gqa=grouped,
            )  # fmt: skip

    return Made(attend, dense if form.data else None)


def _flex(row: Row, inputs: tuple[Tensor, ...]) -> Made:
    """FlexAttention, compiled. A block mask that reads no data is made once for all rows that have it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    call, made, loads = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask), inputs[3:]
    mask = _mask(row, loads)

    def build() -> Any:
        return made(mask, None, None, row.length, row.length, device=str(inputs[0].device))

    block_mask = None
    if row.form.keep is not None:
        block_mask = build() if row.form.data else _block_mask(row.form, row.length, row.window, str(inputs[0].device))

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return call(q, k, v, block_mask=block_mask, scale=row.scale, enable_gqa=row.heads != row.key_heads)

    return Made(attend, build if row.form.data else None)


@lru_cache(maxsize=8)
def _block_mask(form: Form, length: int, window: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)(
        _mask(Row("", form, length, window=window), ()), None, None, length, length, device=device
    )


def _mask(row: Row, loads: tuple[Tensor, ...]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The row's mask as FlexAttention takes it."""

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = row.keep(i, j, *loads)
        assert keep is not None
        return keep

    return mask


def _fla(row: Row) -> Made:
    """flash-linear-attention's chunked kernels, on (B,S,H,D)."""
    linear = importlib.import_module("fla.ops.linear_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        across = (t.transpose(1, 2) for t in (q, k, v))
        found: Tensor = linear.chunk_linear_attn(*across, scale=row.scale, normalize=False)[0].transpose(1, 2)
        return found

    return Made(attend)
