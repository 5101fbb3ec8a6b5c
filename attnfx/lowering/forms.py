"""In which form a kernel meets each term of a bias: chosen by what it costs in the tile, among forms that are exact.

    formula    computed in the tile, from what it loads
    data       a tensor of the model, loaded
    key        a number of each key, tabulated once a call; what all keys of a row share is dropped
    products   u_r(i) * v_r(j), tabulated once a call, and a number of each key
    distance   table[h, i - j]
    tile       table[h, i, j], where it is small beside the queries: windows of an image
    band       a product of the query with a vector of the distance, computed block by block (attnfx/sites/band.py)

A sum of products replaces a number by larger ones. It is taken only where their size is proved (positions, sines; never coordinates
that are data, whose squares may cancel), in units of the numbers that all queries and keys share, and small enough that float32
rounds it more finely than the dtype of the queries does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, cast

import sympy
import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.algebra.separation import Separation, additive, loads, separation
from attnfx.expr import INDEX, Expr, Int, Load
from attnfx.lowering import costs
from attnfx.lowering.magnitude import centres, magnitude
from attnfx.lowering.tables import Table, relative
from attnfx.site import AttentionSite

Form = Literal["formula", "data", "key", "products", "distance", "tile", "band"]
#: The largest products that float32 adds up finely enough for queries of a dtype: eps(float32) * SIZE is a quarter of its eps,
#: and a few rounding errors for float32 itself.
SIZE = {torch.bfloat16: 4096.0, torch.float16: 2048.0, torch.float32: 64.0, torch.float64: 4096.0}
#: A fill at or below this meets no real score, shifted or not.
UNREACHABLE = -1e30
#: A dense table has at most this part of the queries' elements.
SMALL = sympy.Rational(1, 4)
MOST_PRODUCTS = 8


@dataclass(frozen=True)
class Choice:
    """The form of one term: its slots and bytes for each score, and why it is not another one."""

    term: Expr
    form: Form
    slots: float
    bytes: float
    rank: int | None = None
    axes: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Forms:
    """A score program in the chosen forms. ``shift``: what was dropped, shared by all keys of a row."""

    score: Expr
    tables: tuple[Table, ...]
    shift: Expr | None
    choices: tuple[Choice, ...]


@lru_cache(maxsize=1024)
def choose(score: Expr, site: AttentionSite) -> Forms:
    """The forms of the terms of a widened, clamped score program; tables follow ``site.side``."""
    return _Planner(site).planned(score)


@dataclass
class _Planner:
    site: AttentionSite
    tables: dict[tuple[Expr, tuple[str, ...]], Table] = field(default_factory=dict)
    shift: Expr | None = None
    choices: dict[Expr, Choice] = field(default_factory=dict)

    def planned(self, score: Expr) -> Forms:
        parts = self._terms(score)
        inside = {n for part, _ in parts if has_score(part) for n in expr.walk(part)}
        made: dict[Expr, Expr] = {}
        for part, factor in parts:
            if has_score(part) or not part.dtype.is_floating_point or part == expr.ONE:
                continue
            if part not in made:
                made[part] = self.term(part, alone=part not in inside)
            self._drop(part, factor)

        def leaf(node: Expr) -> Expr | None:
            if node in made:
                return made[node]
            return None if has_score(node) else self.distances(node)

        score = expr.rebuild(score, leaf)
        if (band := self.site.band) is not None:
            vector = Load(band.right, (band.row,), band.dtype)
            self._chose(vector, "band", costs.band(band.width), band.width * band.dtype.itemsize * costs.COSTS.per_query)
        return Forms(score, tuple(self.tables.values()), self.shift, tuple(self.choices.values()))

    def _terms(self, score: Expr) -> list[tuple[Expr, float]]:
        """The summands of the logits with their factors; a bias that is separable as a whole is one of them."""
        found: list[tuple[Expr, float]] = []
        for part, factor in additive(score, stop=lambda e: not has_score(e)):
            whole = not has_score(part) and expr.depends_on(part, "i") and expr.depends_on(part, "j") and self._apart(part)
            found += [(part, factor)] if has_score(part) or whole else additive(part, factor)
        return found

    def term(self, e: Expr, alone: bool) -> Expr:
        """What stands for a summand of the logits. ``alone``: it stands nowhere else in them."""
        if not (expr.depends_on(e, "i") and expr.depends_on(e, "j")) or self._plain(e):
            if loads(e) or expr.depends_on(e, "i", "j"):
                self._chose(
                    e, "data" if isinstance(e, Load) else "formula", costs.in_tile(e) + costs.COSTS.fma, costs.bytes_read(e)
                )
            return e
        learned = self._learned(e)
        options: list[tuple[float, Form]] = [] if learned else [(costs.in_tile(e) + costs.COSTS.fma, "formula")]
        apart = self._apart(e) if alone else None
        if learned and apart is not None and apart.row_constant is not None and self.site.dtype.itemsize < 4:
            # In half precision the gradients of a row add up to no more than nearly zero, and what is dropped would multiply that.
            apart = None
        if apart is not None and not any(self._learned(x) for pair in apart.terms for x in pair):
            price = len(apart.terms) * costs.product() + (apart.per_key is not None) * costs.per_key_number()
            kept = apart.row_constant is not None and not droppable(self.site)
            options.append((price + kept * costs.COSTS.fma, "products" if apart.terms else "key"))
        if relative(e):
            options.append((costs.tabulated(), "distance"))
        elif (elements := self._elements(e)) is not None:
            options.append((costs.tabulated("b" not in _axes(e)) + costs.everywhere(e) * elements, "tile"))
        slots, best = min(options, key=lambda option: option[0], default=(0.0, "formula"))
        return self._formed(e, best, slots, apart)

    def _formed(self, e: Expr, form: Form, slots: float, apart: Separation | None) -> Expr:
        if form == "formula":
            read = self.distances_inside(e)
            self._chose(e, form, costs.in_tile(read) + costs.COSTS.fma, costs.bytes_read(read), why=self._why(e))
            return read
        if form in ("distance", "tile"):
            table = self._table(e, ("h" if expr.depends_on(e, "h") else "", "i-j") if form == "distance" else _axes(e))
            self._chose(e, form, slots, costs.TABLE_BYTES, axes=table.axes)
            return table.element
        assert apart is not None
        made: list[Expr] = [] if apart.per_key is None else [self._vector(apart.per_key)]
        made += [expr.mul(self._vector(u), self._vector(v), torch.float32) for u, v in apart.terms]
        if apart.row_constant is not None and not droppable(self.site):
            made.append(self._vector(apart.row_constant))
        each = costs.COSTS.per_key * costs.TABLE_BYTES
        read_bytes = each * apart.rank + costs.COSTS.per_query * costs.TABLE_BYTES * len(apart.terms)
        self._chose(e, form, slots, read_bytes, apart.rank)
        total = made[0]
        for other in made[1:]:
            total = expr.add(total, other, torch.float32)
        return total

    def _drop(self, e: Expr, factor: float) -> None:
        """Adds what the chosen form of a term leaves out, ``factor`` times, to the shift."""
        if self.choices.get(e) is None or self.choices[e].form not in ("key", "products") or not droppable(self.site):
            return
        apart = self._apart(e)
        if apart is None or apart.row_constant is None:
            return
        dropped = expr.mul(apart.row_constant, expr.constant(factor, torch.float64), torch.float64)
        self.shift = dropped if self.shift is None else expr.add(self.shift, dropped, torch.float64)

    def distances_inside(self, e: Expr) -> Expr:
        return expr.rebuild(e, self.distances)

    def distances(self, node: Expr) -> Expr | None:
        """A function of i - j somewhere in a formula, tabulated where that is cheaper or it is learned; itself where not."""
        if has_score(node) or not relative(node):
            return None
        read = any(expr.depends_on(x, "i", "j") for n in loads(node) for x in n.indices)
        if not (read or self._learned(node) or costs.in_tile(node) + costs.COSTS.fma > costs.tabulated()):
            return node
        return self._table(node, ("h" if expr.depends_on(node, "h") else "", "i-j")).element

    def _apart(self, e: Expr) -> Separation | None:
        """The separation of ``e`` with centred positions, where it has one that float32 carries."""
        found = separation(e, centres(e, self.site))
        if found is None or len(found.terms) > MOST_PRODUCTS or not (found.terms or found.per_key is not None):
            return None
        hidden = loads(found.row_constant) - loads(found.per_key) - {n for pair in found.terms for x in pair for n in loads(x)}
        if hidden:  # an infinite number there is NaN in the model
            return None
        return found if size_of(found, self.site) <= SIZE.get(self.site.dtype, 0.0) else None

    def _why(self, e: Expr) -> str:
        """Why a term that has a separation is computed as it is."""
        found = separation(e)
        if found is None or self._apart(e) is not None:
            return ""
        large = math.isinf(size_of(found, self.site))
        what = "its numbers are data, whose products may cancel" if large else "its products are too large for float32 here"
        return f"rank {found.rank}, but {what}"

    def _elements(self, e: Expr) -> float | None:
        """How many elements of a dense table there are for each score, None where it is not small beside the queries."""
        s = self.site
        sizes = {"b": s.batch, "h": s.heads, "i": s.queries, "j": s.keys}
        if not all(n.is_Integer and n > 0 for n in sizes.values()):
            return None
        elements, scores = (math.prod(int(sizes[a]) for a in axes) for axes in (_axes(e), "bhij"))
        queries = int(s.batch * s.heads * s.queries) * s.head_dim
        return elements / scores if elements <= queries * SMALL else None

    def _vector(self, e: Expr) -> Load:
        return self._table(expr.cast(e, torch.float32), _axes(e)).element

    def _table(self, recipe: Expr, axes: tuple[str, ...]) -> Table:
        at = recipe, axes
        if at not in self.tables:
            self.tables[at] = Table(len(self.site.side) + len(self.tables), recipe, axes)
        return self.tables[at]

    def _learned(self, e: Expr) -> bool:
        return any(self.site.side[cast(int, n.slot)].requires_grad for n in loads(e))

    def _plain(self, e: Expr) -> bool:
        """Whether ``e`` is a tensor of the model indexed by b, h, i and j themselves."""
        return isinstance(e, Load) and all(
            isinstance(x, Int) and (x.value in INDEX.values() or x.value.is_Integer) for x in e.indices
        )

    def _chose(
        self, e: Expr, form: Form, slots: float, read: float, rank: int | None = None, axes: tuple[str, ...] = (), why: str = ""
    ) -> None:
        self.choices.setdefault(e, Choice(e, form, slots, read, rank, axes, why))


def droppable(site: AttentionSite) -> bool:
    """Whether nobody sees a number that is added to all scores of a row: no sink stands beside them, no fill is in reach, and the
    row's maximum is no result."""
    alone = site.sink is None and site.literal is None and site.normaliser == "softmax"
    return alone and (site.keep == expr.TRUE or site.fill <= UNREACHABLE)


def size_of(found: Separation, site: AttentionSite) -> float:
    """A bound of what is added up in a tile, in units of the numbers that queries and keys share."""
    total = sum(magnitude(u, site) * magnitude(v, site) for u, v in found.terms)
    for part in (found.per_key, None if droppable(site) else found.row_constant):
        total += 0.0 if part is None else magnitude(part, site)
    return total


def _axes(e: Expr) -> tuple[str, ...]:
    return tuple(name for name in "bhij" if expr.depends_on(e, name))
