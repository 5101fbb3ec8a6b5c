"""The index arithmetic of reshapes: which element of a tensor an element of its reshape is."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from attnfx import expr
from attnfx.algebra.integers import recombined
from attnfx.expr import Expr, Int
from attnfx.patterns.lift import Index, Lifter, Stale


def reshaped(lifter: Lifter, old: Sequence[sympy.Expr], new: Sequence[sympy.Expr], index: Index) -> Index:
    """The index into a tensor of sizes ``old`` of element ``index`` of its reshape to sizes ``new``.

    Axes are matched in groups of equal products, so that a reshape that only splits or merges some axes leaves the others alone.
    """
    known, key = lifter.mirror.lifted.setdefault(("reshaped", lifter.known), {}), (tuple(old), tuple(new), index)
    if key not in known:
        known[key] = _reshaped(lifter, old, new, index)
    return known[key]  # type: ignore[no-any-return]


def _reshaped(lifter: Lifter, old: Sequence[sympy.Expr], new: Sequence[sympy.Expr], index: Index) -> Index:
    result: list[Expr] = []
    a = b = 0
    while a < len(old) or b < len(new):
        left, right = [], []
        product_left = product_right = sympy.Integer(1)
        if a < len(old):
            left.append(old[a])
            product_left *= old[a]
            a += 1
        if b < len(new):
            right.append(b)
            product_right *= new[b]
            b += 1
        while sympy.expand(product_left - product_right) != 0:
            take_left = b >= len(new) or (a < len(old) and _smaller(product_left, product_right))
            if take_left and a < len(old):
                left.append(old[a])
                product_left *= old[a]
                a += 1
            elif b < len(new):
                right.append(b)
                product_right *= new[b]
                b += 1
            else:
                raise Stale("a reshape between sizes that could not be compared")
        result.extend(_group(lifter, left, [new[r] for r in right], [index[r] for r in right]))
    return tuple(result)


def _smaller(a: sympy.Expr, b: sympy.Expr) -> bool:
    ratio = sympy.cancel(b / a)
    if ratio.is_Integer:
        return True
    if sympy.cancel(a / b).is_Integer:
        return False
    if a.is_Integer and b.is_Integer:
        return bool(a < b)
    # Symbolic: b holds a factor that a lacks, so a has to grow.
    return bool(sympy.denom(ratio) == 1)


def _group(lifter: Lifter, old: list[sympy.Expr], new: list[sympy.Expr], index: list[Expr]) -> list[Expr]:
    if len(old) == len(new) == 1:
        return list(index)
    flat: Expr = expr.integer(0)
    for size, at in zip(new, index, strict=True):
        flat = expr.add(expr.mul(flat, Int(size)), at) if size != 1 else flat
    if isinstance(flat, Int):
        flat = Int(recombined(flat.value))
    result: list[Expr] = []
    for k, size in enumerate(old):
        below = sympy.Mul(*old[k + 1 :])
        digit = lifter.floordiv(flat, below)
        result.append(expr.integer(0) if size == 1 else digit if k == 0 else lifter.modulo(digit, size))
    return result
