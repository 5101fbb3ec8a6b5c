"""Attention among tokens of one and the same id, from a list of ids that is known when the graph is compiled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import positions
from attnfx.variants.attend import Attend, beside, read

Ids = tuple[int, ...] | str


def checked(name: str, ids: Any) -> None:
    """Refuse what is neither whole numbers nor a path; a file is read only when it is needed."""
    if isinstance(ids, str) and ids:
        return
    if not isinstance(ids, tuple) or not ids or any(isinstance(x, bool) or not isinstance(x, int) for x in ids):
        raise PolicyError(f"{name} is {ids!r}; it must be whole numbers, or the path of a file of them.")


def numbers(ids: Ids) -> tuple[int, ...]:
    """The ids, read from their file where it is a path: a JSON list or a tensor saved by torch, row after row."""
    if not isinstance(ids, str):
        return ids
    try:
        found = json.loads(Path(ids).read_text()) if Path(ids).suffix == ".json" else torch.load(ids, weights_only=True)
        given = torch.as_tensor(found)
        if given.is_floating_point() or given.is_complex():
            raise ValueError(f"the ids are {given.dtype}, not whole numbers")
        return tuple(given.flatten().tolist())
    except Exception as error:  # torch.load raises many kinds
        raise PolicyError(f'No ids can be read from "{ids}": {type(error).__name__}: {error}') from error


def objections(site: AttentionSite, count: int, what: str) -> tuple[str, ...]:
    """Why ``count`` tokens, ``what``, are not those of ``site``."""
    if site.keys != count:
        return (f"The {what} are of {count} tokens; the site has {site.keys} keys.",)
    return positions.objections(site, "a list of tokens")


def kept(site: AttentionSite, *, shared: int = 0, rows: bool = False) -> AttentionSite:
    """``site`` where each query keeps the keys of its own id, and the first ``shared`` keys, by one more side tensor of int64: the
    id of each key (N,), or of each key of each sequence (B,N) with ``rows``.

    A tile whose queries and keys have ids in ranges that are apart is skipped.
    """
    site, slot = beside(site, (site.batch, site.keys) if rows else (site.keys,), torch.int64)
    j, row = expr.index("j"), (expr.index("b"),) if rows else ()
    query, key = (read(slot, *row, x, dtype=torch.int64) for x in (positions.position(site), j))
    same: Expr = expr.logical_or(expr.eq(query, key), expr.le(j, expr.integer(shared - 1)))
    return site.replace(keep=expr.logical_and(site.keep, same))


def table(ids: Sequence[int]) -> Tensor:
    """Ids as a side tensor (N,)."""
    return torch.tensor(ids, dtype=torch.int64)


def named(attend: Attend, name: str) -> Tensor:
    """The ids (B,N) that the caller hands to the model by a name."""
    site = attend.site
    found = torch.reshape(torch.ops.aten.to.dtype(attend.given(name), torch.int64), (-1, attend.number(site.keys)))
    return torch.ops.aten.expand.default(found, [attend.number(site.batch), -1])  # type: ignore[no-any-return]


def begun(positions: Tensor) -> Tensor:
    """The numbers (B,N) of documents of which each begins where a position (B,N) is not one more than the one before it."""
    first = torch.ne(positions[:, 1:], positions[:, :-1] + 1)
    return torch.cumsum(torch.nn.functional.pad(first, (1, 0)), 1)
