"""Pages of keys that a single query attends to, gathered, so that nothing else of keys and values is read for it."""

from __future__ import annotations

import math

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx import expr
from attnfx.expr import INDEX, Int
from attnfx.site import AttentionSite
from attnfx.variants import key_masks, selection, standing
from attnfx.variants.attend import Attend, beside, read

#: Keys of a page up to which a kernel scores pages.
LARGEST = 128


def possible(site: AttentionSite, keys: int) -> bool:
    """Whether a single query tells keys apart by nothing but a mask that can be gathered, and the ``keys`` that it attends to are
    at most half of all, where their number is known."""
    if site.queries != 1 or site.band is not None or site.dropout or not selection.ordered(site):
        return False
    others = [e for e in (site.score, site.weight, site.sink) if e is not None]
    if any(isinstance(n, Int) and n.value.has(INDEX["i"], INDEX["j"]) for e in others for n in expr.walk(e)):
        return False
    # a query without keys is to give zero or NaN: there are no other values for it
    lost = site.fill == -math.inf and not site.additive and key_masks.readable(site.keep) and not expr.depends_on(site.keep, "h")
    if not lost and not _all_shown(site):
        return False
    return not site.keys.is_Integer or 2 * keys <= int(site.keys)


def scores(attend: Attend, key: Tensor, by: Tensor, page: int) -> Tensor:
    """The means of by . k (B, HK, pages) over pages of k (B, HK, N, D), ``by`` (B, HK, 1, D): one pass over the keys."""
    if has_kernel(attend.device, attend.site.dtype, page):
        made: Tensor = torch.ops.attnfx.page_scores.default(torch.detach(key), by, page)
        return made
    number, count = selection.counted(attend, attend.site.keys, page), attend.number(attend.site.keys)
    products = torch.mul(selection.wide(key, attend.site.dtype), by)
    sums = torch.sum(torch.unflatten(pad(products, (0, 0, 0, number * page - count)), 2, (-1, page)), (3, 4))
    return torch.div(sums, torch.clamp(torch.add(torch.mul(attend.arange(number), -page), count), max=page))


def has_kernel(device: torch.device, dtype: torch.dtype, page: int) -> bool:
    """Whether a kernel scores pages; elsewhere the compiler makes one of torch's operations."""
    return device.type == "cuda" and dtype.itemsize == 2 and page <= LARGEST


def attended(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, by: Tensor, top: int, page: int, sinks: int, window: int
) -> Tensor:
    """The attention to the ``top`` best complete pages by :func:`scores`, to those of the first ``sinks`` keys and of the last
    ``window`` ones, and to the one that the query stands in."""
    site, last = attend.site, _last(attend)
    pages, chosen = _chosen(attend, scores(attend, key, by, page), last, top, page, sinks, window)
    within = attend.arange(page)
    at = torch.flatten(torch.add(torch.unsqueeze(torch.mul(pages, page), 3), within), 2, 3)  # (B, HK, T)
    kept = torch.flatten(torch.logical_and(torch.unsqueeze(chosen, 3), torch.ge(within, 0)), 2, 3)
    kept = torch.logical_and(kept, torch.le(at, last))
    at = torch.clamp(at, 0, attend.number(site.keys - 1))
    if not _all_shown(site):
        shown = torch.squeeze(key_masks.kept(attend, site.keep), 1)  # (B or 1, 1, N)
        everywhere = torch.ones_like(key[..., 0], dtype=torch.bool)
        kept = torch.logical_and(kept, torch.gather(torch.logical_and(shown, everywhere), 2, at))
    keys, values = (
        torch.gather(x, 2, torch.unsqueeze(at, 3).expand(-1, -1, -1, width))
        for x, width in ((key, site.head_dim), (value, site.value_dim))
    )
    return attend(_over(site, count(top, page, sinks, window) * page), query, keys, values, [kept])


def count(top: int, page: int, sinks: int, window: int) -> int:
    """How many pages are gathered, some of which may be hidden."""
    return top + -(-sinks // page) + -(-window // page) + 1


def _chosen(attend: Attend, found: Tensor, last: Tensor, top: int, page: int, sinks: int, window: int) -> tuple[Tensor, Tensor]:
    """The numbers of pages (B, HK, count), and which of them count, each page once."""
    number = selection.counted(attend, attend.site.keys, page)
    complete = torch.le(torch.add(torch.mul(attend.arange(number), page), page - 1), last)
    found = torch.masked_fill(found, torch.logical_not(complete), float("-inf"))
    if not isinstance(number, int):  # perhaps fewer pages than are to be chosen
        found = pad(found, (0, top), value=float("-inf"))
    best = torch.topk(found, min(top, number) if isinstance(number, int) else top, sorted=False)[1]
    ahead = attend.arange(-(-sinks // page))
    near = torch.sub(torch.div(last, page, rounding_mode="floor"), attend.arange(-(-window // page) + 1))
    # a page of the first keys is none of the others, and a page near the query none of the best
    apart = torch.ge(torch.mul(near, page), sinks), torch.gt(torch.add(torch.mul(near, page), page - 1), torch.sub(last, window))
    near_counts = torch.logical_and(torch.logical_and(*apart), torch.ge(near, 0))
    far = torch.le(torch.add(torch.mul(best, page), page - 1), torch.sub(last, window))
    best_counts = torch.logical_and(far, torch.ge(torch.mul(best, page), sinks))
    nothing, all_true = torch.zeros_like(best[..., :1]), torch.ones_like(best[..., :1], dtype=torch.bool)
    pages = torch.cat([best, torch.add(near, nothing), torch.add(ahead, nothing)], 2)
    ahead_counts = torch.logical_and(torch.ge(ahead, 0), all_true)
    return pages, torch.cat([best_counts, torch.logical_and(near_counts, all_true), ahead_counts], 2)


def _last(attend: Attend) -> Tensor:
    """The key that the query stands at, (B or 1, 1, 1)."""
    place = standing.last_key(attend.site)
    if place is None:
        return torch.reshape(torch.add(attend.arange(1), attend.number(attend.site.keys - 1)), (1, 1, 1))
    assert isinstance(place.slot, int)
    return torch.reshape(attend.loads[place.slot], (-1, 1, 1))


def _all_shown(site: AttentionSite) -> bool:
    """Whether the query sees all keys: there is no mask, or a causal one."""
    return site.facts.full or site.facts.causal_offset == site.keys - site.queries


def _over(site: AttentionSite, keys: int) -> AttentionSite:
    """The attention to gathered keys, of which those that count are one more side tensor (B, HK, keys)."""
    made, slot = beside(site, (site.batch, site.key_heads, keys), torch.bool)
    b, h, j = (expr.index(name) for name in "bhj")
    group = expr.integer(int(site.heads) // int(site.key_heads))
    keep = read(slot, b, expr.floordiv(h, group), j, dtype=torch.bool)
    made = made.replace(keys=sympy.Integer(keys), keep=keep)
    # where nothing is hidden, the query sees the page that it stands in, or a complete one
    return made.replace(fill=-math.inf, additive=False, empty_rows="zero") if _all_shown(site) else made
