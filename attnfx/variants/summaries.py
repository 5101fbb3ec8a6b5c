"""Keys near a query beside summaries of the others, in one softmax: the summaries are further keys, before the model's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Expr
from attnfx.site import AttentionSite
from attnfx.variants import dense, linear
from attnfx.variants.attend import Attend

#: Whether query i sees the summary, or the key, of a number.
Seen = Callable[[Expr, Expr], Expr]


def objections(site: AttentionSite, what: str, causal: bool | None = None) -> tuple[str, ...]:
    """Why keys cannot be summarised; ``what`` summarises them."""
    return (*known(site, what), *linear.objections(site, what, causal), *linear.square(site, what))


def known(site: AttentionSite, what: str) -> tuple[str, ...]:
    """Why sizes are not numbers, which ``what`` needs."""
    if all(n.is_Integer for n in (site.queries, site.keys, site.heads, site.key_heads)):
        return ()
    return (f"There are {site.queries} queries and {site.keys} keys; {what} needs numbers that are known.",)


def led(attend: Attend, query: Tensor) -> Tensor:
    """One query for each key head: the mean of those that share it, (B, G, M, D)."""
    site = attend.site
    return torch.mean(torch.unflatten(query, 1, (int(site.key_heads), int(site.heads) // int(site.key_heads))), 2)


def segments(x: Tensor, length: int, size: int, fill: float = 0.0) -> Tensor:
    """(B, G, N, D) as (B, G, segments, size, D), the last segment filled up."""
    number = -(-length // size)
    return torch.unflatten(torch.nn.functional.pad(x, (0, 0, 0, number * size - length), value=fill), 2, (number, size))


def gathered(by: Tensor, key: Tensor, value: Tensor, scale: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each segment its keys and its values (B, G, S, size, ...), weighed by the softmax of ``scale`` by.key; ``by`` is
    (B, G, S, D), and ``kept`` (S, size) what is no filling."""
    z = torch.sum(key * torch.unsqueeze(by, 3), -1) * scale
    if kept is not None:
        z = torch.where(kept, z, torch.full((), float("-inf"), dtype=torch.float32))
    weights = torch.unsqueeze(torch.softmax(z, -1), -1)
    return torch.sum(weights * key, 3), torch.sum(weights * value, 3)


def attended(
    attend: Attend, count: int, query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], seen: Seen, near: Seen
) -> Tensor:  # fmt: skip
    """O over ``count`` summaries and the model's keys, ``keys`` and ``values`` of both: query i sees the summaries that ``seen``
    says, and of the keys those that ``near`` says and the model keeps."""
    site, (i, j) = attend.site, (expr.index(name) for name in "ij")
    own = j - expr.integer(count)
    kept = expr.substitute(site.keep, {expr.INDEX["j"]: expr.INDEX["j"] - count})
    of_keys = expr.logical_and(expr.le(expr.integer(count), j), near(i, own), kept)
    keep = expr.logical_or(expr.logical_and(expr.lt(j, expr.integer(count)), seen(i, j)), of_keys)
    more = site.replace(keys=site.keys + count, keep=keep)
    return attend(more, query, torch.cat(keys, 2), torch.cat(values, 2))


def stated(z: list[Tensor], kept: list[Tensor], values: list[Tensor]) -> Tensor:
    """For an oracle: one softmax over several sets of keys, each with logits (B, H, M, N), a mask and values (B, H, N, E)."""
    weights = dense.softmax(torch.cat(z, -1), torch.cat([k.expand(x.shape) for k, x in zip(kept, z, strict=True)], -1))
    return torch.einsum("bhij,bhje->bhie", weights, torch.cat(values, 2))
