"""KernelPlan: everything about one site that a kernel is generated from and called with, as data that travels as JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, cast

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import Const, Expr, Int, Load
from attnfx.lowering import bands, forms, skips
from attnfx.lowering.derivative import derivative, widened
from attnfx.lowering.gradients import KINDS, BiasGradient, find
from attnfx.lowering.kept import where_kept
from attnfx.lowering.outside import split
from attnfx.lowering.ranges import Bounds, key_bounds, query_bounds
from attnfx.lowering.tables import KEYS, TABLE_AXES, Table, clamped, size_symbol
from attnfx.site import AttentionSite, Origin, SideTensor
from attnfx.sites import ordering
from attnfx.sites.facts import Facts, prove
from attnfx.sites.serialize import (
    FormatError,
    Json,
    Reader,
    Writer,
    fields,
    read_symbol,
    site_from_data,
    site_to_data,
    write_symbol,
)  # fmt: skip

Family = Literal["flash", "portable"]
VERSION = 2
WIDEST = 256
#: A fill at or below this meets no real score.
UNREACHABLE = -1e30
#: exp(-110) is 0 in float32: a row whose largest kept score is farther than this above the fill gives the fill no weight.
REACH = 110.0
#: A row whose largest logit is this low, or this high, owes it to a mask that was added as data.
HIDDEN = -5e3


@dataclass(frozen=True)
class KernelPlan:
    """A site made ready: slots are numbers, the score program is widened and reads relative tables, indices stay in range.

    ``site.side`` lists the caller's side tensors, then one for each of ``tables``, and the window of a band; ``symbols`` are the
    size symbols whose values the caller passes (those of the site that the plan was made from, in its order). ``exact_rows``:
    rows may exist for which eager's own softmax over all keys, or its NaN, must be computed. ``shift``: what the score program
    leaves out because all keys of a row share it, in b, h and i: only the LSE knows it.
    """

    site: AttentionSite
    family: Family
    tables: tuple[Table, ...]
    gradients: tuple[BiasGradient, ...]
    exact_rows: bool
    symbols: tuple[sympy.Symbol, ...]
    shift: Expr | None = None

    @property
    def given(self) -> int:
        """How many side tensors the caller passes."""
        return len(self.site.side) - len(self.tables) - (self.site.band is not None)

    @cached_property
    def facts(self) -> Facts:
        return self.site.facts

    @cached_property
    def key_bounds(self) -> Bounds | None:
        return key_bounds(self.facts)

    @cached_property
    def query_bounds(self) -> Bounds | None:
        return query_bounds(self.facts)

    @cached_property
    def score_derivative(self) -> Expr | None:
        return derivative(self.site.score)

    @property
    def masked(self) -> bool:
        return self.site.keep != expr.TRUE

    @cached_property
    def weight(self) -> Expr | None:
        """The factor of the probabilities that a kernel applies in its tiles."""
        return split(self.site.weight)[0]

    @cached_property
    def outer(self) -> Expr | None:
        """The factor that no key changes, applied to the rows of the output."""
        return split(self.site.weight)[1]

    @property
    def has_outside(self) -> bool:
        """Whether the kernel's output is not yet the site's: there is a sink, or a factor of its rows."""
        return self.site.sink is not None or self.outer is not None

    @cached_property
    def tile_expressions(self) -> tuple[Expr, ...]:
        """What is evaluated inside of a kernel: score, keep, and the literal logits and the weight where it has them."""
        return (self.site.score, self.site.keep, *(e for e in (self.site.literal, self.weight) if e is not None))

    @cached_property
    def used_slots(self) -> tuple[int, ...]:
        """The slots that a kernel loads from, in order."""
        return _slots(self.tile_expressions)

    @cached_property
    def differentiated_slots(self) -> tuple[int, ...]:
        """Those of them whose gradients a kernel owes: the literal logits also read what the tables were made from."""
        loaded = _slots([e for e in self.tile_expressions if e is not self.site.literal])
        return (*loaded, *bands.slots(self.site))

    @cached_property
    def kernel_symbols(self) -> tuple[sympy.Symbol, ...]:
        """The size symbols that a kernel's expressions mention: the first of the numbers that it is given."""
        used = frozenset().union(*map(expr.symbols, self.tile_expressions))
        return tuple(sorted(used - set(expr.INDEX.values()), key=str))

    @property
    def floor(self) -> float:
        """The natural logit at or below which a row's largest kept score leaves weight to the fill, or is that of a mask."""
        return max(self.site.fill + REACH, self.hidden)

    @cached_property
    def hidden(self) -> float:
        """The natural logit from which on, in magnitude, a row's maximum is that of a mask added as data; else -inf."""
        return HIDDEN if _may_hide_a_mask(self.site.score) else -math.inf

    @property
    def empty_zero(self) -> bool:
        """Whether a row without keys gives zeros."""
        return _gives_zero(self.site)

    def values(self, sizes: Sequence[int], keys: int, loads: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
        """The value of every size symbol: the caller's ``sizes``, the number of keys, the sizes of side tensors."""
        if len(sizes) != len(self.symbols):
            known = ", ".join(map(str, self.symbols)) or "none"
            raise ValueError(f"{len(sizes)} sizes were given; the plan has the symbols {known}")
        values = {KEYS: keys, **dict(zip(self.symbols, sizes, strict=True))}
        for slot, axis in self._sized:
            values[size_symbol(slot, axis)] = loads[slot].shape[axis]
        return values

    @cached_property
    def _sized(self) -> tuple[tuple[int, int], ...]:
        wanted = {s for e in self._expressions for s in expr.symbols(e)}
        axes = ((slot, axis) for slot, t in enumerate(self.site.side) for axis in range(len(t.shape)))
        return tuple(at for at in axes if size_symbol(*at) in wanted)

    @property
    def _expressions(self) -> tuple[Expr, ...]:
        shift = () if self.shift is None else (self.shift,)
        return (*self.site.expressions, *shift, *(t.recipe for t in self.tables))

    def to_json(self) -> str:
        """One line of JSON; equal plans give equal text."""
        writer = Writer()
        tables = [{"slot": t.slot, "recipe": writer.add(t.recipe), "axes": list(t.axes)} for t in self.tables]
        site = site_to_data(self.site, writer)
        data = {
            "attnfx": VERSION, "family": self.family, "exact_rows": self.exact_rows,
            "symbols": [write_symbol(s) for s in self.symbols], "site": site, "tables": tables,
            "gradients": [_gradient_data(g, writer) for g in self.gradients],
            "shift": None if self.shift is None else writer.add(self.shift), "nodes": writer.nodes,
        }  # fmt: skip
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> KernelPlan:
        """The plan that ``to_json`` wrote; the same object for the same text. Raises FormatError; runs nothing that it reads."""
        return _load(text)


@lru_cache(maxsize=1024)
def make_plan(site: AttentionSite, family: Family) -> KernelPlan | tuple[str, ...]:
    """The plan of ``site`` for a family, or sentences that say why it has none."""
    site = _readied(site)
    if objections := _objections(site, family):
        return objections
    exact, chosen = _needs_exact_rows(site), _forms(site)
    score, tables = chosen.score, chosen.tables
    ready = site.replace(
        score=score, keep=clamped(site.keep, site), side=(*site.side, *(_side(t, site) for t in tables), *bands.side(site)),
        sink=None if site.sink is None else clamped(site.sink, site), weight=clamped(site.weight, site),
        literal=None if site.literal is None else clamped(site.literal, site),
    )  # fmt: skip
    found = find(score, ready.side, [t.slot for t in tables if t.relative], _shared(site))
    if any(isinstance(g, str) for g in found):
        return cast(tuple[str, ...], found)
    planned = (*cast(tuple[BiasGradient, ...], found), *bands.gradients(ready))
    plan = KernelPlan(ready, family, tables, planned, exact, site.symbols, chosen.shift)
    return (_unprintable(plan) if family == "flash" else ()) or plan


def choices(site: AttentionSite) -> tuple[forms.Choice, ...]:
    """In which form a plan of ``site`` has each term that is added to the scores."""
    return _forms(_readied(site)).choices


def _readied(site: AttentionSite) -> AttentionSite:
    """``site`` with numbers for slots, what the mask decides decided, and without literal logits where no row needs them."""
    site = _numbered(site).replace(origin=Origin())
    exact = _needs_exact_rows(site)
    return site.replace(score=where_kept(site, exact), literal=site.literal if exact else None)


def _forms(site: AttentionSite) -> forms.Forms:
    return forms.choose(widened(clamped(site.score, site)), site)


def _slots(expressions: Sequence[Expr]) -> tuple[int, ...]:
    nodes = (n for e in expressions for n in expr.walk(e))
    return tuple(sorted({cast(int, n.slot) for n in nodes if isinstance(n, Load)}))


def _unprintable(plan: KernelPlan) -> tuple[str, ...]:
    from attnfx.lowering import codegen

    return codegen.objections(plan)


def _objections(site: AttentionSite, family: Family) -> tuple[str, ...]:
    found = [*site.uncomputable, *bands.objections(site, family), *skips.objections(site)]
    found += ordering.objections(site.order, site.queries, site.keys, alone=site.band is None and site.skip is None)
    if not site.exponential:
        found.append(f'the normaliser is "{site.normaliser}"; a plan computes a softmax over keys.')
    if site.normaliser == "max" and (site.sink is not None or site.empty_rows == "zero"):
        found.append("exponentials that are not divided by their sum have a sink or rows of zeros; here such rows are eager's.")
    if family == "flash":
        for name, size in (("head_dim", site.head_dim), ("value dim", site.value_dim)):
            if not 1 <= size <= WIDEST:
                found.append(f"{name} is {size}; the flash kernels take 1 to {WIDEST}.")
        if site.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            found.append(f"the dtype is {site.dtype}; the flash kernels take float16, bfloat16 and float32.")
    if not has_score(site.score):
        found.append("the scores do not depend on query and key.")
    if has_score(site.keep):
        found.append("the mask depends on the scores; a mask here is a predicate of positions and side tensors.")
    if site.requires_grad and derivative(widened(site.score)) is None:
        found.append(
            "the score program has no derivative here: it uses an operation of the scores that is not one of add, sub, mul, "
            "div by what is not a score, neg, tanh, exp, sigmoid, cast, where."
        )
    if site.sink is not None and expr.depends_on(site.sink, "j"):
        found.append(f"the sink {site.sink} depends on the key or the score; a sink is one logit for a batch, head and query.")
    if has_score(site.weight):
        found.append("the factor of the probabilities depends on the scores; here it is one of positions and side tensors.")
    learned = _learned(split(site.weight)[0], site)
    if learned:
        found.append(
            f"the factor of the probabilities that changes with the key needs a gradient for side tensor {learned[0]}; "
            "a gradient is computed for factors of whole rows, those without j."
        )
    if math.isnan(site.fill) or site.fill > 0:
        found.append(f"the fill is {site.fill}; a mask fills with a negative number or -inf.")
    return tuple(found)


def _learned(weight: Expr | None, site: AttentionSite) -> list[int]:
    """The slots of a factor in the tile whose tensors need a gradient."""
    loads = [n for n in expr.walk(weight) if isinstance(n, Load)] if weight is not None else []
    return sorted(cast(int, n.slot) for n in loads if site.side[cast(int, n.slot)].requires_grad)


def _shared(site: AttentionSite) -> bool:
    """Whether every key that has weight in a row carries what is added to the row's scores, and no row is NaN for want of keys."""
    if site.keep == expr.TRUE or (site.additive and site.fill != -math.inf):
        return True
    return site.fill == -math.inf and (_gives_zero(site) or site.facts.nonempty)


def _gives_zero(site: AttentionSite) -> bool:
    """Whether a row whose keys are all -inf gives zeros: a sink takes all of such a row."""
    return site.empty_rows == "zero" or (site.empty_rows == "nan" and site.sink is not None)


def _numbered(site: AttentionSite) -> AttentionSite:
    """Slots as numbers into ``side``, in the order in which score, keep, sink and weight mention them, unless they are
    numbers already."""
    loads = [n for e in site.expressions for n in expr.walk(e) if isinstance(n, Load)]
    slots: dict[Hashable, int] = {}
    for load in loads:
        slots.setdefault(load.slot, len(slots))
    if all(isinstance(s, int) for s in slots):
        return site
    if len(slots) != len(site.side):
        raise ValueError(f"the formulas load from {len(slots)} slots, and the site has {len(site.side)} side tensors")

    def leaf(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        return Load(slots[node.slot], tuple(expr.rebuild(x, leaf) for x in node.indices), node.dtype)

    names = [name for name in ("score", "keep", "sink", "literal", "weight") if getattr(site, name) is not None]
    return site.replace(**{"literal": None, **{name: expr.rebuild(getattr(site, name), leaf) for name in names}})


def _needs_exact_rows(site: AttentionSite) -> bool:
    hidden = _may_hide_a_mask(site.score)
    if site.normaliser == "max":
        return True  # the row statistics are results
    if site.keep == expr.TRUE or (_gives_zero(site) and site.fill == -math.inf):
        return hidden
    facts = prove(site.keep, site.queries, site.keys, site.ranges)
    return hidden or not (facts.nonempty or facts.full) or site.fill > UNREACHABLE


def _may_hide_a_mask(score: Expr) -> bool:
    """Whether a mask may hide in the scores, as a constant that is no score or in a loaded float tensor, and cover whole rows."""
    for node in expr.walk(score):
        if isinstance(node, Const) and not isinstance(node.value, bool) and abs(node.value) >= -HIDDEN:
            return True
        if isinstance(node, Load) and node.dtype.is_floating_point:
            return True
    return False


def _side(table: Table, site: AttentionSite) -> SideTensor:
    slots = [cast(int, n.slot) for n in expr.walk(table.recipe) if isinstance(n, Load)]
    grad = any(site.side[s].requires_grad and site.side[s].dtype.is_floating_point for s in slots)
    shape = table.shape(site.batch, site.heads, site.queries, site.keys)
    return SideTensor(tuple(sympy.sympify(n) for n in shape), table.dtype, grad)


@lru_cache(maxsize=1024)
def _load(text: str) -> KernelPlan:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise FormatError(f"the plan is not JSON: {failure}") from None
    fields(data, "plan", ("attnfx", "family", "exact_rows", "symbols", "site", "tables", "gradients", "shift", "nodes"))
    if data["attnfx"] != VERSION:
        raise FormatError(f"the plan's format is {data['attnfx']!r}; this version reads {VERSION}")
    if data["family"] not in ("flash", "portable") or not isinstance(data["exact_rows"], bool):
        both = f"{data['family']!r}, {data['exact_rows']!r}"
        raise FormatError(f"family and exact_rows are {both}; known: flash, portable, and a bool")
    sides = data["site"].get("side") if isinstance(data["site"], dict) else None
    reader = Reader(data["nodes"], len(sides) if isinstance(sides, list) else 0)
    site = site_from_data(data["site"], reader)
    side, symbols = len(site.side), tuple(read_symbol(s) for s in _items(data["symbols"], "symbols"))
    tables = tuple(_read_table(t, reader, side) for t in _items(data["tables"], "tables"))
    gradients = tuple(_read_gradient(g, reader, side) for g in _items(data["gradients"], "gradients"))
    shift = None if data["shift"] is None else reader.get(data["shift"])
    return KernelPlan(site, data["family"], tables, gradients, data["exact_rows"], symbols, shift)


def _items(data: Json, what: str) -> list[Json]:
    if not isinstance(data, list):
        raise FormatError(f"{what} is a {type(data).__name__}; it is a list")
    return data


def _slot(data: Json, side: int) -> int:
    if type(data) is not int or not 0 <= data < side:
        raise FormatError(f"slot {data!r} is not one of the {side} side tensors")
    return data


def _flag(data: Mapping[str, Json], name: str) -> bool:
    if not isinstance(data[name], bool):
        raise FormatError(f"{name} is {data[name]!r}; it is a bool")
    return data[name]  # type: ignore[no-any-return]


def _read_table(data: Json, reader: Reader, side: int) -> Table:
    fields(data, "table", ("slot", "recipe", "axes"))
    axes = tuple(_items(data["axes"], "axes"))
    if not all(isinstance(a, str) and a in TABLE_AXES for a in axes) or len(set(axes)) < len(axes) or "i-j" in axes[:-1]:
        raise FormatError(f"the axes of a table are {list(axes)}; known: {', '.join(map(repr, TABLE_AXES))}, each once")
    return Table(_slot(data["slot"], side), reader.get(data["recipe"]), axes)


def _gradient_data(gradient: BiasGradient, writer: Writer) -> dict[str, Json]:
    return {**vars(gradient), "axes": [a if isinstance(a, str) else writer.add(a) for a in gradient.axes]}


def _read_gradient(data: Json, reader: Reader, side: int) -> BiasGradient:
    fields(data, "gradient", ("slot", "kind", "batch_broadcast", "head_broadcast", "axes", "factor", "inside"))
    axes = [a if isinstance(a, str) else reader.get(a) for a in _items(data["axes"], "axes")]
    kind, slot, known = data["kind"], _slot(data["slot"], side), ("", "b", "h", "i", "j", "i-j")
    if kind not in KINDS or not all(isinstance(a, Int) or a in known for a in axes):
        raise FormatError(f"a gradient is {kind!r} of {axes}; known: {', '.join(KINDS)} of b, h, i, j, i-j")
    factor = data["factor"]
    if type(factor) is not float or not math.isfinite(factor):
        raise FormatError(f"factor is {factor!r}; it is a finite float")
    broadcast = _flag(data, "batch_broadcast"), _flag(data, "head_broadcast")
    return BiasGradient(slot, kind, *broadcast, cast(tuple[str | Int, ...], tuple(axes)), factor, _flag(data, "inside"))
