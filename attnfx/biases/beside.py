"""What stands for a bias that is taken out of a site: further columns of queries and keys, and tensors that the graph holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.nodes import has_score
from attnfx.biases.pair_network import PairNetwork
from attnfx.expr import Call, Expr, Load, Score
from attnfx.site import AttentionSite, SideTensor

#: The values of a side tensor by its slot, or why they are not known.
Values = Callable[[int], Tensor | str]
#: Summands of logits, each with the number that it is multiplied by.
Summands = list[tuple[Expr, float]]


class Pair(Protocol):
    """A pair representation of the graph: features of each two tokens, of which a bias is a linear function."""

    @property
    def channels(self) -> int: ...


@dataclass(frozen=True)
class Known:
    """What a graph tells of a site's side tensors, by slot: their values (None where nothing guards them), or the pair
    representation behind an element of one; sentences where it does not. ``size``: a size as a number that may be compared;
    ``given``: what is known of an input of the model, by its name."""

    values: Values | None
    pair: Callable[[Load], Pair | str]
    size: Callable[[sympy.Expr], Any] | None = None
    given: Callable[[str], SideTensor | str] | None = None


@dataclass(frozen=True, eq=False)
class Networks:
    """Columns that the graph computes at every call from a pair representation; ``scale`` (H) divides those of queries."""

    pair: Pair
    network: PairNetwork
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Beside:
    """What a rewritten site is given beside its own operands.

    ``loads``: which of its side tensors the site still reads; ``tensors``: what the graph holds and the site reads after them.
    ``query`` (H, M, C) and ``key`` (HK, N, C): further columns of queries and keys, the same in the whole batch; or ``networks``
    compute them. ``notes``: sentences for the report.
    """

    site: AttentionSite
    loads: tuple[int, ...]
    tensors: tuple[Tensor, ...] = ()
    query: Tensor | None = None
    key: Tensor | None = None
    networks: Networks | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exact:
    """Why a bias stays as it is."""

    reason: str


def total(parts: Summands) -> Expr:
    """The sum of ``parts``, in float32."""
    found: Expr | None = None
    for part, factor in parts:
        term = expr.mul(expr.cast(part, torch.float32), expr.constant(factor, torch.float32), torch.float32)
        found = term if found is None else expr.add(found, term, torch.float32)
    return expr.constant(0.0, torch.float32) if found is None else found


def compacted(site: AttentionSite) -> tuple[AttentionSite, tuple[int, ...]]:
    """``site`` with those side tensors alone that it reads, and which these are."""
    kept = tuple(sorted({s for e in site.expressions for s in slots(e)}))

    def leaf(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        return Load(kept.index(slot(node)), tuple(expr.rebuild(x, leaf) for x in node.indices), node.dtype)

    names = [name for name in ("score", "keep", "weight", "sink", "literal") if getattr(site, name) is not None]
    changed = {name: expr.rebuild(getattr(site, name), leaf) for name in names}
    return site.replace(side=tuple(site.side[s] for s in kept), **{"literal": None, **changed}), kept


def scale_of(kept: Summands, site: AttentionSite, values: Values | None) -> Tensor | None:
    """What each head (H) multiplies the products of queries and keys by; None where that is not a number for each head."""
    scored = [(part, factor) for part, factor in kept if has_score(part)]
    if len(scored) != 1:
        return None
    part, factor = scored[0]
    by: Expr = expr.ONE
    if not isinstance(part, Score):
        if not (isinstance(part, Call) and part.op == "mul" and Score() in part.args):
            return None
        by = part.args[1] if part.args[0] == Score() else part.args[0]
    read = slots(by)
    if has_score(by) or expr.depends_on(by, "b", "i", "j") or any(site.side[s].requires_grad for s in read):
        return None
    if read and (values is None or any(isinstance(values(s), str) for s in read)):
        return None
    found = factor * evaluated([(by, 1.0)], site, values, queries=1, keys=1)[:, 0, 0]
    return found if bool((found.isfinite() & (found != 0)).all()) else None


def evaluated(parts: Summands, site: AttentionSite, values: Values | None, queries: int, keys: int) -> Tensor:
    """The sum of ``parts`` at every head, query and key, (H, M, N) in float64; each in the model's own dtypes."""
    used = {s for part, _ in parts for s in slots(part)}
    found = [values(s) if values is not None and s in used else None for s in range(len(site.side))]
    loads = [t if isinstance(t, Tensor) else torch.empty(0) for t in found]
    device = next((t.device for t in found if isinstance(t, Tensor)), torch.device(site.device))
    heads = int(site.heads)
    made = torch.zeros(heads, queries, keys, dtype=torch.float64, device=device)
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    for h in range(heads):
        grid = {"b": i.new_zeros(()), "h": i.new_full((), h), "i": i, "j": j}
        for part, factor in parts:
            made[h] += factor * evaluate(part, grid, loads, {}, clamp=True).double()
    return made


def slots(e: Expr) -> tuple[int, ...]:
    """The side tensors that ``e`` reads."""
    return tuple(sorted({slot(n) for n in expr.walk(e) if isinstance(n, Load)}))


def slot(load: Load) -> int:
    assert isinstance(load.slot, int)
    return load.slot


def short(e: Expr) -> str:
    """``e`` as text of at most 80 letters."""
    text = str(e)
    return text if len(text) <= 80 else text[:76] + " ..."
