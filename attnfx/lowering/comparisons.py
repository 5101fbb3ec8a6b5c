"""Comparisons of whole numbers, with what hangs on keys on a side of its own.

`i - j < 1024` takes a difference for each pair of a tile. As none of them changes while a kernel walks over tiles, the compiler
keeps them all in registers, and others are spilled. `i <= j + 1023` is one number a query and one a key.
"""

from __future__ import annotations

import sympy

from attnfx.expr import INDEX, Call, Int

_I, _J = INDEX["i"], INDEX["j"]
#: Larger constants could overflow when they are added to a position in int32.
_LARGEST = 2**30

Sides = tuple[sympy.Expr, sympy.Expr]


def parted(e: Call) -> tuple[Sides, ...]:
    """The comparisons of the same kind that ``e`` is the conjunction of, each as its two sides; none where it does not compare
    whole numbers. That of |x| is two."""
    left, right = e.args
    if not isinstance(right, Int):
        return ()
    if isinstance(left, Call) and left.op == "abs" and isinstance(left.args[0], Int) and e.op in ("lt", "le"):
        return _apart(left.args[0].value, right.value), _apart(-right.value, left.args[0].value)
    return (_apart(left.value, right.value),) if isinstance(left, Int) else ()


def _apart(left: sympy.Expr, right: sympy.Expr) -> Sides:
    """Two numbers that compare as ``left`` and ``right`` do, only one of them with j in it; these themselves where that is so
    already, where a term holds both i and j, and where it would take more terms or large constants."""
    if not any(e.has(_I) and e.has(_J) for e in (left, right)):
        return left, right
    terms = _terms(sympy.expand(left - right))
    of_keys, rest = sympy.Add(*(t for t in terms if t.has(_J))), sympy.Add(*(t for t in terms if not t.has(_J)))
    number, others = rest.as_coeff_Add()
    if of_keys.has(_I) or len(terms) > len(_terms(left)) + len(_terms(right)) or abs(number) > _LARGEST:
        return left, right
    if of_keys.could_extract_minus_sign():
        return others, -of_keys - number
    return of_keys + number, -others


def _terms(e: sympy.Expr) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.Add.make_args(e))
