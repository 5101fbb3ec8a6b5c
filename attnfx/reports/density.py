"""How much of a dense attention a variant computes, for the report."""

from __future__ import annotations

import sympy

from attnfx.site import AttentionSite
from attnfx.variants.base import Variant, flops_of, pairs

_LONGEST = 160
_UNITS = ("", "k", "M", "G", "T", "P")


def work(variant: Variant, site: AttentionSite) -> str:
    """The floating-point operations of a forward pass beside those of the attention that ``variant`` replaces; of lengths that
    change, as formulas. Empty where they are as many, or the formula is long."""
    some, whole = sympy.sympify(variant.cost(site).flops), flops_of(site, pairs(site))
    if sympy.simplify(some - whole) == 0:
        return ""
    if some.is_number and whole.is_number:
        share = f" ({float(some / whole):.1%})" if whole else ""
        return f"it computes {_count(some)}FLOP forward where the dense attention computes {_count(whole)}FLOP{share}"
    found = f"it computes {sympy.factor_terms(some)} FLOP forward where the dense attention computes {sympy.factor_terms(whole)}"
    return found if len(found) <= _LONGEST else ""


def _count(number: sympy.Expr) -> str:
    """Three digits and a unit: "12.3 G"."""
    value, power = float(number), 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_UNITS[power]}"
