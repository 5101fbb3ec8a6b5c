"""The catalogue of flash cases: sizes, layouts, masks under every fill, biases, dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import programs
import torch
from flash_cases import CAP, MIN32, SCALE, Case
from torch import Tensor

from attnfx.lowering.call import Program


def with_offset(case: Case, loads: tuple[Tensor, ...]) -> Tensor:
    """j <= i + ahead, (M, N); `ahead` is the case's extra."""
    m, n = case.sizes[3], case.sizes[4]
    device = loads[0].device if loads else case.extras.get("device")
    return torch.arange(n, device=device) <= torch.arange(m, device=device)[:, None] + case.extras["ahead"]


NONE = Program(programs.plain, programs.plain_grad, None, None, None, -math.inf, False, False)
CAUSAL = replace(NONE, keep=programs.causal, kv_range=programs.causal_keys, q_range=programs.causal_rows)
WINDOW = replace(NONE, keep=programs.window, kv_range=programs.window_keys, q_range=programs.window_rows)
FILLS = {
    "sdpa zero": (-math.inf, False, False),
    "replaced by finfo.min": (MIN32, False, True),
    "finfo.min added": (MIN32, True, True),
    "replaced by -1e4": (-1e4, False, True),
    "-1e4 added": (-1e4, True, True),
    "replaced by -inf": (-math.inf, False, True),
    "-inf added": (-math.inf, True, True),
}


def folded(program: Program) -> Program:
    """A program whose logits are nothing but the dots times SCALE, known to be."""
    return replace(program, slope=SCALE, pure=True)


def filled(program: Program, fill: str) -> Program:
    value, additive, exact = FILLS[fill]
    return replace(program, fill=value, additive=additive, exact_rows=exact)


def padding_load(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """bool (B, N): left padding in batch 0, everything padded in the last batch if the case says so."""
    b, n = case.sizes[0], case.sizes[4]
    keep = torch.rand(b, n, device=device) > 0.3
    keep[0, : n // 2] = False
    if case.extras.get("all padded"):
        keep[-1] = False
    return (keep,)


def window_keep(case: Case, loads: tuple[Tensor, ...]) -> Tensor:
    distance = torch.arange(case.sizes[3], device=case.extras.get("device"))[:, None]
    distance = distance - torch.arange(case.sizes[4], device=case.extras.get("device"))
    return (distance >= 0) & (distance < case.extras["window"])


def plain_cases() -> Iterator[Case]:
    for m, n, d, dv in (
        (37, 53, 1, 5),
        (53, 37, 5, 1),
        (37, 53, 16, 40),
        (32, 48, 64, 64),
        (19, 33, 80, 16),
        (1, 70, 40, 80),
        (50, 1, 16, 16),
    ):
        yield Case(f"plain M{m} N{n} D{d} DV{dv}", NONE, (2, 4, 2, m, n, d, dv))
    for name, heads, key_heads in (("MHA", 3, 3), ("GQA", 6, 2), ("MQA", 4, 1)):
        yield Case(f"plain {name}", NONE, (2, heads, key_heads, 20, 37, 16, 24))
    for layout in ("heads last", "transposed", "expanded", "strided"):
        yield Case(f"layout {layout}", NONE, layout=layout)
    for dtype in (torch.float16, torch.bfloat16):
        yield Case(f"plain {dtype}", folded(NONE), (1, 2, 1, 37, 53, 40, 24), dtype=dtype)
        yield causal_case(3, sizes=(1, 2, 1, 37, 53, 40, 24), dtype=dtype)
    yield Case("plain, folded", folded(NONE))
    yield Case("causal, not folded", CAUSAL, ints=(3,), keep=with_offset, extras={"ahead": 3})
    capped = replace(NONE, score=programs.softcap, score_grad=programs.softcap_grad)
    yield Case("softcap", capped, logits=lambda case, dot, loads: CAP * torch.tanh(dot * (SCALE / CAP)))


def causal_case(ahead: int, program: Program = CAUSAL, name: str = "causal", **more: Any) -> Case:
    base = Case("", folded(program), ints=(ahead,), keep=with_offset, extras={"ahead": ahead})
    case = replace(base, **more)
    return replace(case, name=f"{name} ahead {ahead} M{case.sizes[3]} N{case.sizes[4]} {str(case.dtype)[6:]}")


def masked_cases() -> Iterator[Case]:
    for ahead in (0, 16, -7, -40):
        yield causal_case(ahead)
    yield causal_case(5, sizes=(1, 2, 2, 70, 37, 16, 16))
    no_ranges = replace(CAUSAL, kv_range=None, q_range=None)
    yield causal_case(0, no_ranges, "causal without ranges")
    # whole tiles of keys: masked ones are not checked for the end
    even = (1, 2, 1, 70, 64, 24, 16)
    yield causal_case(5, sizes=even)
    yield causal_case(-5, no_ranges, "causal without ranges", sizes=even)
    yield causal_case(-7, filled(CAUSAL, "finfo.min added"), "causal finfo.min added", sizes=even, grad_lse=False)
    for width in (1, 5, 40):
        yield Case(
            f"window {width}",
            WINDOW,
            (1, 2, 1, 70, 70, 16, 16),
            ints=(width,),
            keep=window_keep,
            extras={"window": width},
        )
    yield Case("window M90 N37", WINDOW, (1, 2, 1, 90, 37, 16, 16), ints=(20,), keep=window_keep, extras={"window": 20})
    for fill in FILLS:
        exact = "sdpa" not in fill
        # eager's own float32 has a spacing of 1e-3 at -1e4
        slack = 300.0 if "1e4" in fill else 1.0
        # float64 cannot tell finfo.min from finfo.min + log(N), so its gradient of such an LSE is not the true one
        lse = fill not in ("finfo.min added", "replaced by -inf", "-inf added")
        yield causal_case(-7, filled(CAUSAL, fill), f"causal {fill}", slack=slack, grad_lse=lse)
        program = replace(filled(NONE, fill), keep=programs.padding)
        yield Case(
            f"padding {fill}",
            program,
            loads=padding_load,
            ints=lambda case, loads: (case.sizes[4],),
            slack=slack,
            keep=lambda case, loads: loads[0][:, None, None],
            extras={"all padded": True},
            grad_lse=lse,
        )
        if exact:
            both = replace(
                filled(NONE, fill),
                keep=programs.padded_causal,
                kv_range=programs.padded_causal_keys,
                q_range=programs.padded_causal_rows,
            )
            yield Case(
                f"padded causal {fill}",
                both,
                loads=padding_load,
                ints=lambda case, loads: (case.sizes[4], 0),
                keep=lambda case, loads: loads[0][:, None, None] & with_offset(case, loads),
                slack=slack,
                extras={"ahead": 0},
                grad_lse=lse,
            )


def slopes(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    return (0.1 / torch.arange(1, case.sizes[1] + 1, device=device, dtype=torch.float32),)


def distances(case: Case, like: Tensor) -> Tensor:
    return torch.arange(case.sizes[3], device=like.device)[:, None] - torch.arange(case.sizes[4], device=like.device)


def table_load(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """(BH, M + N - 1)."""
    heads = 1 if case.bias and case.bias[2] else case.sizes[1]
    return (torch.randn(heads, case.sizes[3] + case.sizes[4] - 1, device=device),)


def bias_load(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """(BB, BH, M or 1, N)."""
    kind, batch, head = case.bias or ("tile", False, False)
    b, h, _, m, n, _, _ = case.sizes
    return (torch.randn(1 if batch else b, 1 if head else h, m if kind == "tile" else 1, n, device=device),)


def bias_strides(case: Case, loads: tuple[Tensor, ...]) -> tuple[int, ...]:
    strides = zip(loads[0].stride(), loads[0].shape, strict=True)
    return (*(stride if size > 1 else 0 for stride, size in strides), case.extras.get("ahead", 0))


def bias_cases() -> Iterator[Case]:
    yield Case(
        "alibi",
        replace(CAUSAL, score=programs.alibi, slope=SCALE),
        loads=slopes,
        ints=(0,),
        keep=with_offset,
        extras={"ahead": 0},
        logits=lambda case, dot, loads: dot * SCALE - loads[0][:, None, None] * distances(case, dot),
    )
    finite = "finfo.min added"
    for program, mask in ((NONE, "dense"), (CAUSAL, "causal"), (filled(CAUSAL, finite), finite)):
        ahead = -7 if mask == finite else 3
        keep = None if program is NONE else with_offset
        shared = {
            "keep": keep,
            "extras": {"ahead": ahead},
            "sizes": (2, 4, 2, 37, 53, 16, 24),
            "grad_lse": mask != finite,
        }
        for batch, head in ((False, False), (True, False), (False, True), (True, True)):
            for kind in ("tile", "column"):
                name = f"{kind} bias {mask} {batch=} {head=}"
                yield Case(
                    name,
                    replace(program, score=programs.dense_bias),
                    loads=bias_load,
                    ints=bias_strides,
                    logits=lambda case, dot, loads: dot * SCALE + loads[0],
                    bias=(kind, batch, head),
                    **shared,
                )
        for head in (False, True):
            yield Case(
                f"diagonal bias {mask} {head=}",
                replace(program, score=programs.relative_bias),
                loads=table_load,
                ints=lambda case, loads: (
                    loads[0].stride(0) if loads[0].shape[0] > 1 else 0,
                    case.sizes[4] - 1,
                    case.extras["ahead"],
                ),
                logits=lambda case, dot, loads: dot * SCALE + loads[0][:, distances(case, dot) + case.sizes[4] - 1],
                bias=("diagonal", True, head),
                **shared,
            )


def dropout_cases() -> Iterator[Case]:
    yield Case("dropout", NONE, dropout=0.3)
    yield causal_case(3, name="dropout causal", dropout=0.5)
    yield replace(causal_case(-7, filled(CAUSAL, "finfo.min added"), "dropout degenerate"), dropout=0.25, grad_lse=False)
    yield Case(
        "dropout tile bias",
        replace(NONE, score=programs.dense_bias),
        loads=bias_load,
        ints=bias_strides,
        logits=lambda case, dot, loads: dot * SCALE + loads[0],
        bias=("tile", True, False),
        dropout=0.3,
    )


def gate_of_table(case: Case, loads: tuple[Tensor, ...]) -> Tensor:
    return loads[0][:, distances(case, loads[0]) + case.sizes[4] - 1]


def gate_of_padding(case: Case, loads: tuple[Tensor, ...]) -> Tensor:
    return loads[0][:, None, None] * 1.5


def gate_of_thirds(case: Case, loads: tuple[Tensor, ...]) -> Tensor:
    device = loads[0].device if loads else case.extras.get("device")
    i = torch.arange(case.sizes[3], device=device)[:, None] + torch.arange(case.sizes[1], device=device)[:, None, None]
    return torch.where((i + 2 * torch.arange(case.sizes[4], device=device)) % 3 == 0, 0.0, 1.25)


def weighted_cases() -> Iterator[Case]:
    gated = {"loads": table_load, "weight": gate_of_table}
    for program, mask in ((NONE, "dense"), (CAUSAL, "causal"), (filled(CAUSAL, "replaced by finfo.min"), "finfo.min")):
        ahead = -7 if mask == "finfo.min" else 3
        yield Case(
            f"weight {mask}",
            replace(program, weight=programs.relative_gate),
            (1, 4, 2, 37, 53, 16, 16),
            ints=lambda case, loads: (loads[0].stride(0), case.sizes[4] - 1, case.extras["ahead"]),
            keep=None if program is NONE else with_offset,
            extras={"ahead": ahead},
            grad_lse=mask != "finfo.min",
            **gated,
        )
    for fill in ("sdpa zero", "replaced by -1e4", "replaced by -inf"):
        yield Case(
            f"weight padding {fill}",
            replace(filled(NONE, fill), keep=programs.padding, weight=programs.padding_gate),
            (2, 2, 1, 37, 53, 16, 16),
            loads=padding_load,
            ints=lambda case, loads: (case.sizes[4],),
            keep=lambda case, loads: loads[0][:, None, None],
            weight=gate_of_padding,
            slack=300.0 if "1e4" in fill else 1.0,
            extras={"all padded": True},
            grad_lse="inf" not in fill,
        )
    for kind, dropout in (("tile", 0.0), ("column", 0.0), ("tile", 0.3)):
        yield Case(
            f"weight {kind} bias {dropout=}",
            replace(NONE, score=programs.dense_bias, weight=programs.every_third),
            (2, 2, 1, 37, 53, 16, 16),
            loads=bias_load,
            ints=bias_strides,
            logits=lambda case, dot, loads: dot * SCALE + loads[0],
            weight=gate_of_thirds,
            bias=(kind, True, False),
            dropout=dropout,
        )


def cases() -> list[Case]:
    return [*plain_cases(), *masked_cases(), *bias_cases(), *dropout_cases(), *weighted_cases()]
