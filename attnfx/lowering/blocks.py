"""Lists of the tiles that a mask keeps: which plans have some, and how they are built, once for all equal masks of a graph.

They are an operator of their own, `attnfx::blocks`, of nothing but what the mask reads, so that the compiler computes those of
equal layers once. Memory is that of the tiles: S = 65536 has 512 x 1024 of them, 2 MB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnfx import expr
from attnfx.algebra.evaluate import Value
from attnfx.algebra.intervals import Enclosure, Profile, enclose
from attnfx.algebra.tiling import Tiling, kinds, kinds_between
from attnfx.expr import Expr, Int, Load, Score
from attnfx.lowering.configs import OWN, WALKED
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.tables import size_symbol

#: Fewer keys than this are visited without lists.
KEYS = 1024
#: Tiles that one program classifies at once, and reduces at once.
VECTOR, REDUCED = 128, 16
#: The tiles, and the value of every size symbol, on which a predicate is tried.
_TRIED, _SIZE = 4096, 64


@dataclass(frozen=True)
class Mask:
    """What of a plan the lists depend on: a plan ``text`` of its mask alone, and which of the caller's tensors it loads from."""

    text: str
    slots: tuple[int, ...]
    per_batch: bool
    per_head: bool


def worthwhile(queries: int, keys: int) -> bool:
    """Whether a call of these sizes walks lists; decode steps have kernels of their own."""
    return keys >= KEYS and queries >= WALKED


@lru_cache(maxsize=1024)
def mask_of(text: str) -> Mask | None:
    """The mask of a plan (JSON text) that a kernel visits by lists; None where closed-form bounds say as much, or nothing does."""
    plan = KernelPlan.from_json(text)
    if plan.family != "flash" or not decidable(plan):
        return None
    from attnfx.lowering import codegen_blocks

    made, slots = _alone(plan)
    if not codegen_blocks.printable(made):
        return None
    return Mask(made.to_json(), slots, expr.depends_on(made.site.keep, "b"), expr.depends_on(made.site.keep, "h"))


@lru_cache(maxsize=1024)
def decidable(plan: KernelPlan) -> bool:
    """Whether the part of a mask that has no closed form decides some tile, were its data sorted."""
    if not plan.facts.rest or plan.site.skip is not None:  # tiles that are decided on have an order
        return False
    found = enclose(expr.logical_and(*plan.facts.rest))
    return found.decides and _tried(found)


def _tried(found: Enclosure) -> bool:
    """Whether anything is decided of sample tiles, with every profile one value in a tile, which grows with the position."""
    with _disable_current_modes():
        ends: list[Tensor] = []
        for p in found.profiles:
            if p.side == "ij":
                rows, columns = (torch.arange(-(-_TRIED // step)) for step in (OWN, WALKED))
                ends += [(rows[:, None] + columns) % 2] * 2
                continue
            step = OWN if p.side == "i" else WALKED
            at = torch.arange(0, _TRIED, step) // 512
            value = at.float() if p.value.dtype.is_floating_point else at % 2 if p.value.dtype == torch.bool else at
            ends += [value[:, None] if p.side == "i" else value] * 2
        symbols = {s for e in (found.must, found.may) for s in expr.symbols(e)}
        tiling = Tiling(1, 1, _TRIED, _TRIED, OWN, WALKED)
        must, may = kinds_between(found, tiling, ends, dict.fromkeys(symbols, _SIZE), torch.device("cpu"))
        return bool(must.any()) or not bool(may.all())


def _alone(plan: KernelPlan) -> tuple[KernelPlan, tuple[int, ...]]:
    """The plan of a mask without everything else: equal for layers that differ elsewhere."""
    keep, site = plan.site.keep, plan.site
    slots = sorted({n.slot for n in expr.walk(keep) if isinstance(n, Load) and isinstance(n.slot, int)})
    places = {slot: n for n, slot in enumerate(slots)}
    renamed = {size_symbol(s, d): size_symbol(places[s], d) for s in slots for d in range(len(site.side[s].shape))}

    def leaf(node: Expr) -> Expr | None:
        if isinstance(node, Load):
            assert isinstance(node.slot, int)
            return Load(places[node.slot], tuple(expr.rebuild(x, leaf) for x in node.indices), node.dtype)
        return Int(node.value.xreplace(renamed)) if isinstance(node, Int) else None

    keep = expr.rebuild(keep, leaf)
    alone = site.replace(
        score=Score(), keep=keep, sink=None, weight=expr.ONE, side=tuple(site.side[s] for s in slots), key_heads=site.heads,
        head_dim=16, value_dim=16, dtype=torch.float32, dropout=0.0, requires_grad=False, fill=float("-inf"), additive=False,
        empty_rows="zero", band=None, order=None,
    )  # fmt: skip
    symbols = tuple(s for s in plan.symbols if s in expr.symbols(keep))
    return KernelPlan(alone, "flash", (), (), False, symbols), tuple(slots)


def shape(batch: int, heads: int, queries: int, keys: int, by_keys: bool) -> tuple[int, int, int, int]:
    """(batch, heads, lists, places of one list)."""
    own, walked = (keys, queries) if by_keys else (queries, keys)
    return batch, heads, (own + OWN - 1) // OWN, 2 + (walked + WALKED - 1) // WALKED


def of_call(
    text: str, query: Tensor, key: Tensor, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, int],
    known: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The lists by rows and, where a gradient will be wanted, by keys, of a call of the plan ``text``; None where it has none.
    ``known``: those that were made before."""
    queries, keys = query.shape[2], key.shape[2]
    small = isinstance(queries, int) and isinstance(keys, int) and not worthwhile(queries, keys)
    mask = None if small or not kernels_run(query.device) else mask_of(text)
    if mask is None:
        return None, None
    given = [loads[s].detach() if loads[s].requires_grad else loads[s] for s in mask.slots]
    batch, heads = query.shape[0] if mask.per_batch else 1, query.shape[1] if mask.per_head else 1
    numbers = [values[s] for s in KernelPlan.from_json(mask.text).symbols]
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, *loads))

    def lists(by_keys: bool) -> Tensor:
        found: Tensor = torch.ops.attnfx.blocks(given, numbers, batch, heads, queries, keys, by_keys, query.device, mask.text)
        return found

    by_rows, by_keys = known
    by_rows = lists(False) if by_rows is None else by_rows
    if not grads:
        return by_rows, None
    return by_rows, lists(True) if by_keys is None else by_keys


def kernels_run(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: on a CPU only inside Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def build(
    loads: Sequence[Tensor], sizes: Sequence[int], batch: int, heads: int, queries: int, keys: int, by_keys: bool,
    device: torch.device, text: str,
) -> Tensor:  # fmt: skip
    """The lists of a mask's plan, int32 in :func:`shape`; what is in them says `templates/classify.py`. By Triton's kernels."""
    from attnfx.lowering import codegen_blocks, handed
    from attnfx.lowering.launch import run
    from attnfx.lowering.templates.classify import profile_ends, tile_lists

    # zeros where no list reaches: equal calls have equal bits
    lists = torch.zeros(shape(batch, heads, queries, keys, by_keys), dtype=torch.int32, device=device)
    if not worthwhile(queries, keys) or lists.numel() == 0:
        return lists
    plan, made = KernelPlan.from_json(text), codegen_blocks.classifier_of(text)
    pointers = handed.pointers(plan, keys, loads)
    numbers = handed.ints(plan, plan.values(sizes, keys, loads), pointers) or (0,)
    own_tiles, walked_tiles = lists.shape[2], lists.shape[3] - 2
    ends = list[Tensor]()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for profile, value in zip(made.enclosure.profiles, made.values, strict=True):
            if profile.side == "ij":
                ends += _table_ends(profile, value, pointers, numbers, lists, queries, keys, by_keys)
                continue
            of_keys, floats = profile.side == "j", profile.value.dtype.is_floating_point
            tiles, step = (own_tiles, OWN) if of_keys == by_keys else (walked_tiles, WALKED)
            both = torch.empty((2, batch, heads, tiles), dtype=torch.float32 if floats else torch.int64, device=device)
            ends += both.unbind(0)
            run(
                profile_ends, (batch * heads * -(-tiles // REDUCED),), both[0], both[1], pointers, numbers, heads,
                keys if of_keys else queries, tiles, VALUE=value, FLOAT=floats, TILE=step, TILES=REDUCED, num_warps=4,
            )  # fmt: skip
        run(
            tile_lists, (own_tiles * batch * heads,), lists, tuple(ends) or (lists,), numbers, heads, queries, keys, own_tiles,
            walked_tiles, CLASSIFY=made.classify, BY_KEYS=by_keys, OWN=OWN, WALKED=WALKED, VECTOR=VECTOR, num_warps=1,
        )  # fmt: skip
    return lists


def _table_ends(
    profile: Profile, value: Any, pointers: Any, numbers: Any, lists: Tensor, queries: int, keys: int, by_keys: bool
) -> tuple[Tensor, Tensor]:
    """The ends of a table of blocks, int64 (batch, heads, row tiles, key tiles)."""
    from attnfx.lowering.launch import run
    from attnfx.lowering.templates.classify import table_ends

    batch, heads = lists.shape[:2]
    rows, columns = (WALKED, OWN) if by_keys else (OWN, WALKED)
    down, across = -(-queries // rows), -(-keys // columns)
    low, high = lists.new_empty((2, batch, heads, down, across), dtype=torch.int64).unbind(0)
    samples, grid = profile.samples(rows, columns), (batch * heads * down * -(-across // VECTOR),)
    run(
        table_ends, grid, low, high, pointers, numbers, heads, queries, keys, down, across,
        VALUE=value, ROWS=rows, COLUMNS=columns, STEP_I=profile.steps[0], STEP_J=profile.steps[1], COUNT_I=samples[0],
        COUNT_J=samples[1], VECTOR=VECTOR, num_warps=1,
    )  # fmt: skip
    return low, high


def plain(
    keep: Expr, loads: Sequence[Tensor], values: Mapping[sympy.Symbol, Value], batch: int, heads: int, queries: int, keys: int,
    by_keys: bool, device: torch.device,
) -> Tensor:  # fmt: skip
    """What :func:`build` gives, in torch operations; places that no list uses are -1."""
    rows, columns = (WALKED, OWN) if by_keys else (OWN, WALKED)
    must, may = kinds(enclose(keep), Tiling(batch, heads, queries, keys, rows, columns), loads, values, device)
    if by_keys:
        must, may = must.transpose(2, 3), may.transpose(2, 3)
    walked = must.shape[-1]
    place = torch.arange(walked, device=device)
    full = must & ((place + 1) * WALKED <= (queries if by_keys else keys))
    partial = may & ~full
    found = torch.full((*must.shape[:3], walked), -1, dtype=torch.int32, device=device)
    for chosen, back in ((partial, False), (full, True)):
        order = (~chosen).to(torch.int8).argsort(dim=-1, stable=True).int()
        used = place < chosen.sum(-1, keepdim=True)
        found = torch.where(used.flip(-1), order.flip(-1), found) if back else torch.where(used, order, found)
    return torch.cat([torch.stack([partial.sum(-1), full.sum(-1)], -1).int(), found], -1)
