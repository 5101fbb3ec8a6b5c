"""LowRankBias lowered: the bias of a site taken out of its scores, and products of its factors put in.

Factors meet a kernel in one of two forms, whichever costs less. Up to a few ranks they are numbers of the query and of the key
that are multiplied in the tile, in float32. Beyond, they are further columns of queries and keys, and the product that makes the
scores adds them up on the tensor cores: no kernel changes, forward or backward, and gradients of queries and keys are slices. In
half precision a rank is three columns (:func:`attnfx.biases.factors.copies`). The kernel multiplies the columns by the scale of the
scores as well, so they are divided by it here.

They may cost as much as reading the bias, in the slots of :mod:`attnfx.lowering.costs`; a bias of a higher rank stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.algebra.summands import summands
from attnfx.biases.beside import Beside, Exact, Summands, Values, compacted, evaluated, scale_of, short, slots, total
from attnfx.biases.factors import Factors, columns, factored
from attnfx.expr import Expr, Load
from attnfx.graphs.buffers import Restless
from attnfx.lowering import costs
from attnfx.lowering.configs import padded
from attnfx.lowering.derivative import widened
from attnfx.lowering.forms import MOST_PRODUCTS, droppable
from attnfx.lowering.plan import HIDDEN, WIDEST, choices
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants.low_rank_bias import LowRankBias

#: More ranks are never laid beside queries and keys: their 96 columns in half precision are one and a half times a head of 64.
MOST_RANKS = 32
#: Scores of one head whose bias is taken apart.
MOST_SCORES = 2**24
#: Bytes of a bias that the second-level cache of a large GPU holds beside everything else.
CACHE = 2**25


def low_rank(site: AttentionSite, variant: LowRankBias, values: Values | None) -> Beside | Exact | tuple[str, ...]:
    """``site`` with products in place of its bias; why it stays exact; or objections."""
    if values is None:
        return (
            "The values of its bias may not be read: they are where torch.compile guards them, not in an export, in a region of "
            'its own (checkpointing), or with options={"buffers": "ignore"}.',
        )
    read = _read(site, values)
    if isinstance(read, tuple):
        return read
    if isinstance(read, Exact):
        return read
    exact = sum(choice.slots for choice in choices(site)) - sum(choice.slots for choice in choices(read.rest)) + _from_memory(read)
    ways = [w for w in (_Way(read, exact, columns=False), _Way(read, exact, columns=True)) if w.possible]
    highest = max(w.most for w in ways)
    if variant.rank is not None and variant.rank > highest:
        return (f"The rank is {variant.rank}; a site like this takes at most {highest}.",)
    tried = [
        (w, w.factors(variant.tolerance, w.worth if variant.rank is None else variant.rank)) for w in ways if w.takes(variant.rank)
    ]
    within = [(w, f) for w, f in tried if variant.rank is not None or max(f.errors) <= variant.tolerance]
    if not within:
        return Exact(_too_high(tried, variant.tolerance, exact))
    way, found = min(within, key=lambda pair: pair[0].price(pair[1].rank))
    return way.made(found)


@dataclass(frozen=True, eq=False)
class _Bias:
    """The bias of a site and the site without it: ``bias`` (H, M, N) in float64; ``scale`` (H), the factor of the products of
    queries and keys, or None where these are changed by more than a factor."""

    site: AttentionSite
    rest: AttentionSite
    bias: Tensor
    scale: Tensor | None
    terms: tuple[Expr, ...]


def _read(site: AttentionSite, values: Values) -> _Bias | Exact | tuple[str, ...]:
    parts = tuple(summands(widened(site.score)))
    fixed: Summands = []
    kept: Summands = []
    why: list[str] = []
    for part, factor in parts:
        reason = _not_fixed(part, site, values)
        (fixed if reason == "" else kept).append((part, factor))
        if reason:
            why.append(reason if isinstance(reason, Restless) else f"{short(part)}: {reason}.")
    if any(isinstance(reason, Restless) for reason in why):
        return Exact(next(reason for reason in why if isinstance(reason, Restless)))
    if not fixed:
        return tuple(why) or ("Nothing that depends on the query and the key is added to its scores.",)
    scores = int(site.queries) * int(site.keys)
    if scores > MOST_SCORES:
        return Exact(f"its bias has {scores} numbers a head, and singular values of more than {MOST_SCORES} are not looked for")
    bias, terms = torch.zeros((), dtype=torch.float64), list[Expr]()
    for part, factor in fixed:
        made = evaluated([(part, factor)], site, values, int(site.queries), int(site.keys))
        if bool((made.abs() < -HIDDEN).all()):
            bias = made + bias
            terms.append(part)
        else:
            kept.append((part, factor))
    if not terms:
        return Exact(f"its bias holds numbers that are infinite, or of {-HIDDEN:g} and more: a mask, which stays exact")
    return _Bias(site, site.replace(score=total(kept)), bias, scale_of(kept, site, values), tuple(terms))


def _from_memory(read: _Bias) -> float:
    """The further slots of reading biases that are whole tensors, as they are, and larger than the caches."""
    sizes = [term.dtype.itemsize for term in read.terms if isinstance(term, Load)]
    far = sum(size for size in sizes if size * read.bias.numel() > CACHE)
    return far * (costs.COSTS.far_byte - costs.COSTS.near_byte)


def _not_fixed(part: Expr, site: AttentionSite, values: Values) -> str | None:
    """Why a summand is not a fixed bias, "" where it is one, None where it is no bias of query and key at all."""
    if has_score(part) or not (expr.depends_on(part, "i") and expr.depends_on(part, "j")):
        return None
    if not part.dtype.is_floating_point:
        return None
    read = slots(part)
    if expr.depends_on(part, "b"):
        return "it differs within the batch" if read else None
    if any(site.side[s].requires_grad for s in read):
        return "a gradient of it is wanted; factors are made of what is not trained"
    found = (values(s) for s in read)
    return next((why for why in found if isinstance(why, str)), "")


@dataclass(frozen=True, eq=False)
class _Way:
    """Factors of a bias as products in the tile, or as columns of queries and keys. ``exact``: the slots of the bias as it is."""

    given: _Bias
    exact: float
    columns: bool

    @property
    def possible(self) -> bool:
        return not self.columns or self.given.scale is not None

    @property
    def most(self) -> int:
        """The highest rank that fits."""
        if not self.columns:
            return MOST_PRODUCTS
        site = self.given.site
        fit = (r for r in range(MOST_RANKS + 1) if site.head_dim + columns(r, site.dtype) <= WIDEST)
        return max(fit, default=0)

    @property
    def worth(self) -> int:
        """The highest rank that costs no more than the exact bias."""
        return max((r for r in range(self.most + 1) if self.price(r) <= self.exact), default=0)

    def takes(self, rank: int | None) -> bool:
        """Whether factors of a rank, or of any that pays, can be had in this way."""
        return self.worth > 0 if rank is None else rank <= self.most

    def price(self, rank: int) -> float:
        """Slots a score."""
        site = self.given.site
        if not self.columns:
            return rank * costs.product()
        width = columns(rank, site.dtype)
        more = padded(site.head_dim + width) - padded(site.head_dim)
        return costs.columns(width, more, int(site.queries), int(site.keys), site.dtype)

    def factors(self, tolerance: float, most: int) -> Factors:
        site = self.given.site
        dtype = site.dtype if self.columns else torch.float32
        return factored(self.given.bias, int(site.key_heads), tolerance, most, dtype, self.given.scale if self.columns else None)

    def made(self, found: Factors) -> Beside:
        """The site with these factors."""
        (rest, kept), given = compacted(self.given.rest), self.given
        side, score, tensors = list(rest.side), rest.score, list[Tensor]()

        def constant(t: Tensor) -> int:
            side.append(SideTensor(tuple(sympy.Integer(n) for n in t.shape), t.dtype))
            tensors.append(t)
            return len(side) - 1

        h, i, j = (expr.index(name) for name in "hij")
        if not droppable(rest):
            row = Load(constant(given.bias.mean(-1).float()), (h, i), torch.float32)
            score = expr.add(score, row, torch.float32)
        if self.columns and found.rank:
            site = rest.replace(score=score, side=tuple(side), head_dim=rest.head_dim + found.query.shape[2])
            return Beside(site, kept, tuple(tensors), found.query, found.key, notes=(self._told(found),))
        if found.rank:
            group = expr.floordiv(h, expr.integer(rest.heads // rest.key_heads))
            u_at, v_at = constant(found.query.mT.contiguous()), constant(found.key.mT.contiguous())
            for r in range(found.rank):
                at = expr.integer(r)
                u, v = Load(u_at, (h, at, i), torch.float32), Load(v_at, (group, at, j), torch.float32)
                score = expr.add(score, expr.mul(u, v, torch.float32), torch.float32)
        return Beside(rest.replace(score=score, side=tuple(side)), kept, tuple(tensors), notes=(self._told(found),))

    def _told(self, found: Factors) -> str:
        width = found.query.shape[2]
        what = f"as {width} columns of queries and keys" if self.columns else "as products in the tile, in float32"
        ranks, errors = ", ".join(map(str, found.ranks)), ", ".join(f"{e:.2g}" for e in found.errors)
        whose = "each head" if len(found.ranks) == len(found.errors) else "each key head"
        bias = " + ".join(short(part) for part in self.given.terms)
        return (
            f"bias {bias}: {what if found.rank else 'left out'}; rank of {whose} {ranks}; largest error of each head {errors}, "
            f"row means apart; {self.price(found.rank):.3g} slots a score in place of {self.exact:.3g}."
        )


def _too_high(tried: list[tuple[_Way, Factors]], tolerance: float, exact: float) -> str:
    cost = f"the bias as it is costs {exact:.3g} slots a score"
    if not tried:
        return f"{cost}, less than a single rank of its factors would"
    way, found = min(tried, key=lambda pair: max(pair[1].errors))
    bad = ", ".join(f"{h} ({e:.2g})" for h, e in enumerate(found.errors) if e > tolerance)
    return (
        f"{cost}, and {'more than ' + str(MOST_RANKS) + ' ranks' if way.worth == MOST_RANKS else f'more than {way.worth} ranks'} "
        f"would cost more; with so many the errors of these heads are above {tolerance:g}: {bad}"
    )
