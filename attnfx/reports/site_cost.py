"""What a forward pass of an attention costs before and after: a model of operations, traffic and memory, as formulas and numbers.

Operations are those of both matrix products. Traffic counts each tensor that is written or read once for each time that it is, as
if caches held nothing between two operations and everything inside of one. Memory is what there is besides operands and result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from attnfx.site import AttentionSite
from attnfx.variants.base import Cost, Variant, flops_of, pairs

if TYPE_CHECKING:
    from attnfx.report import SiteReport

#: Patterns whose model computes the softmax in operations of its own, so that all scores are written to memory.
_WRITTEN_OUT = frozenset(("softmax", "joined softmax", "unnormalised softmax"))
_LSE_BYTES = 4
#: Bytes of one block of scores in the portable family, in float32.
_BLOCK_BYTES = 4 << 20
_B, _H, _G, _M, _N, _D, _E = sympy.symbols("B H G M N D E", positive=True)


@dataclass(frozen=True)
class Quantity:
    """``before`` and ``after``, each as a formula in B, H query heads, G key heads, M queries, N keys, D and E, and at the site's
    sizes; None where nothing is known."""

    name: str
    unit: str
    before: sympy.Expr
    after: sympy.Expr | None
    before_here: sympy.Expr
    after_here: sympy.Expr | None


def quantities(report: SiteReport) -> tuple[Quantity, ...]:
    """Operations, traffic and memory of a site."""
    if not report.site.exponential:
        return ()
    model, runs = report.original or report.site, report.site
    letters, size = _lettered(model), model.dtype.itemsize
    known = {_B: model.batch, _H: model.heads, _G: model.key_heads, _M: model.queries, _N: model.keys}
    known |= {_D: sympy.Integer(model.head_dim), _E: sympy.Integer(model.value_dim)}
    scores = _B * _H * _M * _N
    operands = size * (_B * _H * _M * (_D + _E) + _B * _G * _N * (_D + _E))
    written = report.pattern in _WRITTEN_OUT
    before = {
        "operations": flops_of(letters, _M * _N),
        "traffic": operands + (4 * size * scores if written else 0),
        "memory": 2 * size * scores if written else sympy.Integer(0),
    }
    after: dict[str, sympy.Expr | None]
    if report.variant is not None:
        cost, general = report.variant.cost(model), _general(report.variant, letters)
        here = {"operations": sympy.sympify(cost.flops), "traffic": sympy.sympify(cost.bytes)}
        after = {"operations": general and general.flops, "traffic": general and general.bytes, "memory": _memory(report.decision)}
    elif not report.rewritten:
        after, here = {**before}, {}
    else:
        after = {"operations": flops_of(letters, _pairs(runs)), "traffic": operands, "memory": _memory(report.decision)}
        here = {}
    found = []
    for name, unit in (("operations", "FLOP"), ("traffic", "B"), ("memory", "B")):
        formula = after[name]
        value = here[name] if name in here else None if formula is None else _at(formula, known)
        found.append(Quantity(name, unit, before[name], formula, _at(before[name], known), value))
    return tuple(found)


def _general(variant: Variant, letters: AttentionSite) -> Cost | None:
    """A variant's cost in letters; None of one that needs numbers for its sizes."""
    try:
        return variant.cost(letters)
    except (TypeError, ValueError, ArithmeticError):
        return None


def _pairs(site: AttentionSite) -> sympy.Expr:
    """Pairs of one head that the closed-form bounds of the mask leave; what is evaluated in the tile is not known beforehand."""
    facts = site.facts
    whole = sympy.sympify(pairs(_lettered(site)))
    if not facts.delta_high:
        return whole
    least = facts.delta_high[0]
    width = least + 1 if facts.causal else least + 1 + (_N - 1 if not facts.delta_low else -facts.delta_low[0])
    return sympy.Min(whole, sympy.expand(_M * width))


def _memory(decision: str) -> sympy.Expr:
    """What a lowering needs beside operands and result: the log-sum-exp of each row, and in torch operations a block of scores."""
    lse = _LSE_BYTES * _B * _H * _M
    return lse + _BLOCK_BYTES if decision == "portable" else lse


def _lettered(site: AttentionSite) -> AttentionSite:
    """The same attention with letters for its sizes."""
    facts = site.facts  # of the real sizes: whether a mask is causal does not depend on the letters
    changed = site.replace(batch=_B, heads=_H, key_heads=_G, queries=_M, keys=_N, head_dim=_D, value_dim=_E)
    changed.__dict__["facts"] = facts
    return changed


def _at(e: sympy.Expr, known: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sympy.sympify(e).subs({letter: sympy.sympify(size) for letter, size in known.items()}, simultaneous=True))
