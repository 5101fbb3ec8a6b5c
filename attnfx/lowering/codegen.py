"""From a plan to the generated `@triton.jit` functions that the flash templates take, as a readable module on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import sympy

from attnfx import __version__, expr
from attnfx.algebra.integers import Ranges
from attnfx.expr import Const, Expr, Load
from attnfx.files import replace_file
from attnfx.lowering import box_streams
from attnfx.lowering.codegen_print import HELPERS, Body, Unprintable, _bare, may_mask, proportional
from attnfx.lowering.handed import handed
from attnfx.lowering.plan import KernelPlan
from attnfx.lowering.ranges import FIRST, LAST, Bounds, Candidates
from attnfx.lowering.tables import index_ranges
from attnfx.sites.ordering import Order, Side

if TYPE_CHECKING:
    from attnfx.lowering.call import Program

ELEMENTWISE = "b, h, i, j, loads, ints"
#: Queries, and keys, of one tile; see `short.py`.
SHORT = 64
#: What a range returns for an end that the mask does not bound; the templates clamp it.
FAR = 2147483647
#: Keys of a window up to which it is narrow: a few dozen tiles.
NARROW = 2048


def source(plan: KernelPlan) -> str:
    """The module: score, score_grad, keep, kv_range, q_range, weight, coarse, place, corner. Raises Unprintable."""
    site, parts = plan.site, []
    parts.append(function("score", f"dot, {ELEMENTWISE}", plan, site.score, base_2=True))
    if plan.score_derivative is not None:
        parts.append(function("score_grad", f"dot, {ELEMENTWISE}", plan, plan.score_derivative))
    if plan.masked:
        parts.append(function("keep", ELEMENTWISE, plan, site.keep))
    if plan.weight is not None:
        parts.append(function("weight", ELEMENTWISE, plan, plan.weight))
    if site.literal is not None:
        parts.append(function("coarse", f"dot, {ELEMENTWISE}", plan, site.literal, typed=True))
    for name, letter, bounds in (("kv_range", "i", plan.key_bounds), ("q_range", "j", plan.query_bounds)):
        if bounds is not None:
            parts.append(_range_function(name, letter, plan, bounds))
    if site.order is not None:
        parts.append(definition("place", "number", [f"return {placed(site.order)}"]))
        if (sides := box_streams.sides(site.order)) is not None:
            parts.append(definition("corner", "b, h, number", [f"return {corner(sides)}"]))
    return module_text(_header(plan), parts)


def module_text(header: str, parts: Sequence[str]) -> str:
    """A module of some functions, with what they import."""
    text = "\n\n\n".join(parts)
    helpers = [name for name in HELPERS if f"{name}(" in text]
    imports = "import triton\nimport triton.language as tl\n"
    if helpers:
        imports += f"\nfrom attnfx.lowering.templates.arithmetic import {', '.join(helpers)}\n"
    return f"{header}{imports}\n\n{text}\n"


def objections(plan: KernelPlan) -> tuple[str, ...]:
    """Why a plan has no kernel source, as sentences; empty where it has."""
    try:
        source(plan)
    except Unprintable as reason:
        return (str(reason),)
    return ()


def program(plan: KernelPlan) -> Program:
    """The compiled module's functions, as the flash templates take them; one module for equal plans."""
    return program_of(plan.to_json())


@lru_cache(maxsize=1024)
def program_of(text: str) -> Program:
    """:func:`program` of a plan's JSON text."""
    from attnfx.lowering.call import Program

    plan = KernelPlan.from_json(text)
    written = source(plan)
    found, site = module(written), plan.site
    # what the functions are called with is not in their source
    apart = (site.fill, site.additive, plan.exact_rows, plan.hidden, plan.empty_zero, plan.gradients)
    key = hashlib.sha256(f"{written}{apart}".encode()).hexdigest()[:16]
    slope = float(plan.score_derivative.value) if isinstance(plan.score_derivative, Const) else None
    return Program(
        score=found.score, score_grad=getattr(found, "score_grad", None), keep=getattr(found, "keep", None),
        kv_range=getattr(found, "kv_range", None), q_range=getattr(found, "q_range", None), fill=site.fill,
        additive=site.additive, exact_rows=plan.exact_rows, hidden=plan.hidden, empty_zero=plan.empty_zero,
        weight=getattr(found, "weight", None), coarse=getattr(found, "coarse", None), loaded=_loaded(site.score),
        slope=slope, pure=slope is not None and proportional(site.score), narrow=_narrow(plan),
        key="" if site.skip is not None else key, skip=site.skip, place=getattr(found, "place", None),
        corner=getattr(found, "corner", None), order=site.order,
    )  # fmt: skip


def _loaded(score: Expr) -> bool:
    """Whether a tile of scores reads numbers of its keys."""
    return any(isinstance(n, Load) and expr.depends_on(n, "j") for n in expr.walk(score))


def _narrow(plan: KernelPlan) -> bool:
    """Whether a window of a known width keeps few tiles of keys for a query."""
    bounds = plan.key_bounds
    if bounds is None:
        return False
    widths = [hi - lo for at, lo in bounds.lo for end, hi in bounds.hi if (at, end) == ("first", "last")]
    return any(width.is_Integer and width <= NARROW for width in widths)


def _body(plan: KernelPlan) -> Body:
    strides, at = {}, len(plan.kernel_symbols)
    for slot in plan.used_slots:
        strides[slot] = at
        at += len(plan.site.side[slot].shape)
    places = {slot: n for n, slot in enumerate(plan.used_slots)}
    numbers = {s: n for n, s in enumerate(plan.kernel_symbols)}
    body = Body(places, numbers, strides, ranges(plan))
    body.short = all(n.is_Integer and n <= SHORT for n in (plan.site.queries, plan.site.keys))
    form = handed(plan)
    body.in_base_2, body.masks, body.distances = form.in_base_2, form.masks, form.distances
    body.unmasked = frozenset(t.slot for t in plan.tables if not may_mask(t.recipe))
    return body


def ranges(plan: KernelPlan) -> Ranges:
    """What is known of the symbols of a plan's formulas."""
    known = index_ranges(plan.site)
    return Ranges(known.low, known.high)


def function(name: str, parameters: str, plan: KernelPlan, e: Expr, base_2: bool = False, typed: bool = False) -> str:
    body = _body(plan)
    body.typed = typed
    body.count(e)
    result = body.base_2(e) if base_2 else body.text(e)
    return definition(name, parameters, [*body.lines, f"return {_bare(result)}"])


def placed(order: Order) -> str:
    """Where the token ``number`` lies."""
    terms, below = list[str](), 1
    for n, (size, step) in enumerate(reversed(order.digits)):
        last = n == len(order.digits) - 1
        terms.append(_digit(below, None if last else size, step))
        below *= size
    return " + ".join(reversed(terms)) or "number"


def corner(sides: Sequence[Side]) -> str:
    """The corner of the box that begins with the token ``number``, in the axes of `box_streams.described`."""
    along = [" + ".join(_digit(*digit) for digit in side.digits) for side in sides]
    first = "b" if len(sides) == 2 else f"b * {sides[0].length} + {along.pop(0)}"
    return f"{first}, h, {', '.join(along)}, 0"


def _digit(below: int, size: int | None, weight: int) -> str:
    """A digit of ``number`` times its weight; the first digit, which has no end, has no ``size``."""
    digit = "number" if below == 1 else f"number // {below}"
    if size is not None:
        digit = f"({digit}) % {size}" if below > 1 else f"{digit} % {size}"
    if weight == 1:
        return digit
    return f"({digit}) * {weight}" if below > 1 and size is None else f"{digit} * {weight}"


def _range_function(name: str, letter: str, plan: KernelPlan, bounds: Bounds) -> str:
    body = _body(plan)
    first, last = f"{letter}_first", f"{letter}_last"
    body.positions = {FIRST: first, LAST: last}

    def end(candidates: Candidates, combine: str, default: int) -> str:
        anchors = {"first": first, "last": last, "": ""}
        terms = [_sum(anchors[anchor], body.integer(offset), offset) for anchor, offset in candidates]
        text = terms[0] if terms else str(default)
        for term in terms[1:]:
            text = f"tl.{combine}({text}, {term})"
        return text

    ends = [
        end(bounds.lo, "maximum", 0),
        end(bounds.full_lo, "maximum", 0),
        end(bounds.full_hi, "minimum", FAR),
        end(bounds.hi, "minimum", FAR),
    ]
    if not bounds.full:
        ends[1:3] = ["0", "0"]
    return definition(name, f"{first}, {last}, ints", [f"return {', '.join(ends)}"])


def _sum(anchor: str, text: str, offset: sympy.Expr) -> str:
    if not anchor:
        return _bare(text)
    if offset == 0:
        return anchor
    return f"{anchor} - {abs(int(offset))}" if offset.is_Integer and offset < 0 else f"{anchor} + {_bare(text)}"


def definition(name: str, parameters: str, lines: Sequence[str]) -> str:
    return "\n".join(["@triton.jit", f"def {name}({parameters}):", *(f"    {line}" for line in lines)])


def _header(plan: KernelPlan) -> str:
    numbers = ", ".join([*map(str, plan.kernel_symbols), *(f"strides of loads[{n}]" for n, _ in enumerate(plan.used_slots))])
    # no sizes: attentions that differ in nothing else share a module, and what Triton compiles from it
    formulas = [f"score: {plan.site.score}", f"keep: {plan.site.keep}"]
    if plan.weight is not None:
        formulas.append(f"weight: {plan.weight}")
    if plan.site.literal is not None:
        formulas.append(f"coarse: {plan.site.literal}")
    lines = [line for text in formulas for line in textwrap.wrap(text, 110)]
    text = [f"Generated by attnfx {__version__}.", *lines, f"ints: {numbers or 'none'}"]
    return "".join(f"# {line}\n" for line in text)


def cache_directory() -> Path:
    """$ATTNFX_CACHE_DIR, or `attnfx` inside torch's own cache directory; made where it is missing."""
    chosen = os.environ.get("ATTNFX_CACHE_DIR")
    if not chosen:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        chosen = os.path.join(cache_dir(), "attnfx")
    path = Path(chosen)
    path.mkdir(parents=True, exist_ok=True)
    return path


def module(text: str) -> ModuleType:
    """``text`` as an imported module. Triton reads a function's source from its file, so there is one, named by its content."""
    name = f"attnfx_generated_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_directory() / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        replace_file(path, text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[name]
        raise
    return made
