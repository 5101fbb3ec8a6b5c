"""How large a formula can be, proved from the ranges of its indices; and centres that make positions half as large."""

from __future__ import annotations

import math

import sympy

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Mod, PythonMod, Ranges
from attnfx.expr import INDEX, Call, Const, Expr, Int
from attnfx.lowering.tables import index_ranges
from attnfx.site import AttentionSite

BOUNDED = ("sin", "cos", "tanh", "sigmoid")


def magnitude(e: Expr, site: AttentionSite) -> float:
    """A bound of ``|e|``; infinity where none is known. A number that queries and keys share is the unit: 1."""
    if isinstance(e, Const):
        return abs(float(e.value))
    if isinstance(e, Int):
        return _integer(e.value, index_ranges(site))
    if not expr.depends_on(e, "i", "j"):
        return 1.0
    if not isinstance(e, Call):
        return math.inf
    if e.op in BOUNDED:
        return 1.0
    inner = [magnitude(a, site) for a in e.args]
    if e.op in ("add", "sub"):
        return inner[0] + inner[1]
    if e.op == "mul":
        return 0.0 if 0.0 in inner else inner[0] * inner[1]
    return inner[0] if e.op in ("neg", "abs", "cast") and len(inner) == 1 else math.inf


def _integer(e: sympy.Expr, ranges: Ranges) -> float:
    ends = ranges.minimum(e), ranges.maximum(e)
    if all(x is not None and x.is_Integer for x in ends):
        return float(max(abs(int(x)) for x in ends if x is not None))
    if e.is_Add:
        return sum(_integer(a, ranges) for a in e.args)
    if e.is_Mul:
        return math.prod(_integer(a, ranges) for a in e.args)
    if e.is_Pow and e.args[1].is_Integer and e.args[1] > 0:
        return float(_integer(e.args[0], ranges) ** int(e.args[1]))
    return math.inf


def centres(e: Expr, site: AttentionSite) -> tuple[tuple[sympy.Expr, int], ...]:
    """For each integer part of ``e`` that depends on i or j alone half of its largest value, the same for queries and keys."""
    ranges, found = index_ranges(site), {}
    for node in expr.walk(e):
        if isinstance(node, Int):
            for part in _parts(node.value):
                twin = part.xreplace({INDEX["i"]: INDEX["j"], INDEX["j"]: INDEX["i"]})
                high = [ranges.maximum(x) for x in (part, twin)]
                if all(h is not None and h.is_Integer and h > 0 for h in high):
                    found[part] = max(int(h) for h in high if h is not None) // 2
    return tuple(sorted(found.items(), key=str))


def _parts(e: sympy.Expr) -> list[sympy.Expr]:
    """The sums and products of ``e`` opened, as far as a separation opens them."""
    if e.is_Add or e.is_Mul or (e.is_Pow and e.args[1].is_Integer):
        return [part for a in e.args for part in _parts(a)]
    sides = e.free_symbols & {INDEX["i"], INDEX["j"]}
    return [e] if len(sides) == 1 and (e.is_Symbol or isinstance(e, FloorDiv | Mod | PythonMod)) else []
