"""Index expressions: the value of one element of a tensor as a formula over index symbols.

A mask, a bias or a whole score program is an :class:`Expr` in the batch index ``b``, the head ``h``, the query ``i`` and
the key ``j``:

* :class:`Int` is exact integer algebra (sympy polynomials with floor-division and modulo): positions, sizes, strides;
* :class:`Const` is a float or bool constant;
* :class:`Load` is one element of a tensor that is truly data;
* :class:`Score` is the raw dot product of query ``i`` and key ``j``, in float32;
* :class:`Call` is everything else, an operation of :data:`OPERATIONS` in the dtype that the model computed it in.

Floating point is never re-associated: only rewrites that keep every bit (or that act on integers and booleans) happen in the
constructors below. Proofs about expressions live in :mod:`attnfx.sites.facts`, evaluation in :mod:`attnfx.algebra.evaluate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import sympy
import torch

from attnfx.algebra.integers import floordiv as _int_floordiv
from attnfx.algebra.integers import modulo as _int_modulo
from attnfx.algebra.nodes import (
    BINARY,
    COMPARE,
    INDEX,
    OPERATIONS,
    UNARY,
    Call,
    Const,
    Expr,
    Int,
    Load,
    Number,
    Score,
    children,
    depends_on,
    symbols,
    walk,
)

__all__ = [
    "BINARY",
    "COMPARE",
    "FALSE",
    "INDEX",
    "ONE",
    "OPERATIONS",
    "TRUE",
    "UNARY",
    "Call",
    "Const",
    "Expr",
    "Int",
    "Load",
    "Number",
    "Score",
    "children",
    "depends_on",
    "symbols",
    "walk",
]

TRUE = Const(True, torch.bool)
FALSE = Const(False, torch.bool)
ONE = Const(1.0, torch.float32)


def index(name: str) -> Int:
    """The index symbol ``b``, ``h``, ``i`` or ``j``."""
    return Int(INDEX[name])


def integer(value: int | sympy.Expr) -> Int:
    return Int(sympy.sympify(value))


def constant(value: Number, dtype: torch.dtype) -> Expr:
    """``value`` as the dtype would hold it. Raises ValueError for NaN, which no formula may carry."""
    if dtype == torch.bool:
        return TRUE if value else FALSE
    if not dtype.is_floating_point:
        return integer(int(value))
    if math.isnan(value):
        raise ValueError("NaN cannot be a constant of an index expression")
    return Const(_rounded(float(value), dtype), dtype)


@lru_cache(maxsize=4096)
def _rounded(value: float, dtype: torch.dtype) -> float:
    if dtype == torch.float64 or math.isinf(value):
        return value
    # A real tensor, even while a fake mode is active: the value is wanted now.
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def lift(value: Expr | Number) -> Expr:
    """A Python number as an expression: bool, int64 or float32."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return constant(value, torch.bool)
    return integer(value) if isinstance(value, int) else constant(value, torch.float32)


def is_number(e: Expr, value: Number) -> bool:
    """Whether ``e`` is the constant ``value``."""
    if isinstance(e, Int):
        return bool(e.value == value)
    return isinstance(e, Const) and e.value == value


def call(op: str, *args: Expr, dtype: torch.dtype | None = None) -> Expr:
    """``op`` on ``args`` without any rewriting; the dtype defaults to the promotion of the arguments'."""
    return Call(op, args, dtype or promote(*args))


def promote(*args: Expr) -> torch.dtype:
    """torch's type promotion, with :class:`Int` and constants weak (as Python numbers are)."""
    strong = [a.dtype for a in args if not isinstance(a, Int | Const)] or [a.dtype for a in args]
    dtype = strong[0]
    for other in strong[1:]:
        dtype = torch.promote_types(dtype, other)
    if not dtype.is_floating_point and any(a.dtype.is_floating_point for a in args):
        return next(a.dtype for a in args if a.dtype.is_floating_point)
    return dtype


def _both_int(a: Expr, b: Expr) -> bool:
    return isinstance(a, Int) and isinstance(b, Int)


def add(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int) and not _is_float(dtype):
        return Int(a.value + b.value)
    for x, y in ((a, b), (b, a)):
        if is_number(x, 0) and (dtype or y.dtype) == y.dtype:
            return y
    return call("add", a, b, dtype=dtype)


def sub(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int) and not _is_float(dtype):
        return Int(a.value - b.value)
    if is_number(b, 0) and (dtype or a.dtype) == a.dtype:
        return a
    return call("sub", a, b, dtype=dtype)


def mul(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int) and not _is_float(dtype):
        return Int(sympy.expand(a.value * b.value))
    for x, y in ((a, b), (b, a)):
        if is_number(x, 1) and (dtype or y.dtype) == y.dtype:
            return y
    return call("mul", a, b, dtype=dtype)


def div(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    """True division."""
    if is_number(b, 1) and (dtype or a.dtype) == a.dtype and a.dtype.is_floating_point:
        return a
    return call("div", a, b, dtype=dtype or (promote(a, b) if promote(a, b).is_floating_point else torch.float32))


def floordiv(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int):
        return Int(_int_floordiv(a.value, b.value))
    return call("floordiv", a, b, dtype=dtype)


def mod(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int):
        return Int(_int_modulo(a.value, b.value))
    return call("mod", a, b, dtype=dtype)


def minimum(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    return a if a == b else call("min", a, b, dtype=dtype)


def maximum(a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    return a if a == b else call("max", a, b, dtype=dtype)


def where(condition: Expr, a: Expr, b: Expr, dtype: torch.dtype | None = None) -> Expr:
    if condition == TRUE:
        return cast(a, dtype) if dtype else a
    if condition == FALSE:
        return cast(b, dtype) if dtype else b
    if a.dtype == b.dtype == torch.bool and (isinstance(a, Const) or isinstance(b, Const)):
        if isinstance(a, Const):
            return logical_or(condition, b) if a.value else logical_and(logical_not(condition), b)
        return logical_or(logical_not(condition), a) if is_number(b, 1) else logical_and(condition, a)
    a, b = _decided(a, condition, logical_not(condition)), _decided(b, logical_not(condition), condition)
    return a if a == b else Call("where", (condition, a, b), dtype or promote(a, b))


def _decided(e: Expr, holds: Expr, fails: Expr) -> Expr:
    """A choice inside of a choice, where the outer one decides it."""
    if isinstance(e, Call) and e.op == "where" and e.args[0] in (holds, fails):
        return cast(e.args[1 if e.args[0] == holds else 2], e.dtype)
    return e


def cast(a: Expr, dtype: torch.dtype) -> Expr:
    """``a`` converted with torch's rounding."""
    if a.dtype == dtype:
        return a
    if isinstance(a, Const) or (isinstance(a, Int) and a.value.is_Integer):
        return constant(a.value if isinstance(a, Const) else int(a.value), dtype)
    if isinstance(a, Int) and not (dtype.is_floating_point or dtype == torch.bool):
        return a  # integer algebra is exact; a narrower integer type would only differ by overflow
    if dtype == torch.bool:
        return ne(a, integer(0))
    if isinstance(a, Call) and a.op == "cast" and a.args[0].dtype == torch.bool:
        return cast(a.args[0], dtype)
    return Call("cast", (a,), dtype)


def logical_and(*args: Expr) -> Expr:
    """Conjunction, flattened; TRUE for none."""
    return _junction("and", args, unit=TRUE, zero=FALSE)


def logical_or(*args: Expr) -> Expr:
    """Disjunction, flattened; FALSE for none."""
    return _junction("or", args, unit=FALSE, zero=TRUE)


def _junction(op: str, args: Iterable[Expr], unit: Expr, zero: Expr) -> Expr:
    seen: dict[Expr, None] = {}
    for arg in args:
        for term in arg.args if isinstance(arg, Call) and arg.op == op and arg.dtype == torch.bool else (arg,):
            if term == zero:
                return zero
            if term != unit:
                seen[term] = None
    terms = tuple(seen)
    return unit if not terms else terms[0] if len(terms) == 1 else Call(op, terms, torch.bool)


def logical_not(a: Expr) -> Expr:
    if isinstance(a, Const):
        return FALSE if a.value else TRUE
    if isinstance(a, Call):
        if a.op == "not":
            return a.args[0]
        if a.op in ("le", "eq", "ne") and _both_int(*a.args):
            x, y = a.args
            return {"le": lambda: lt(y, x), "eq": lambda: ne(x, y), "ne": lambda: eq(x, y)}[a.op]()
        if a.op in ("and", "or"):
            return (logical_or if a.op == "and" else logical_and)(*map(logical_not, a.args))
    return Call("not", (a,), torch.bool)


def _chosen(compare: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr | None:
    """A comparison of a constant with one of two constants, as the condition that chooses between them."""
    for at, x, other in ((0, a, b), (1, b, a)):
        if not (_is_constant(other) and isinstance(x, Call) and x.dtype != torch.bool):
            continue
        if isinstance(other, Int) and x.dtype.is_floating_point and abs(other.value) <= 256:  # exact in every type
            other = constant(int(other.value), x.dtype)
        if x.op == "where":
            on, off = x.args[1:]
        elif x.op == "cast" and x.args[0].dtype == torch.bool:
            on, off = constant(1, x.dtype), constant(0, x.dtype)
        else:
            continue
        if all(_is_constant(y) and y.dtype == other.dtype for y in (on, off)):
            chosen = [compare(y, other) if at == 0 else compare(other, y) for y in (on, off)]
            return where(x.args[0], chosen[0], chosen[1], torch.bool)
    return None


def _is_constant(e: Expr) -> bool:
    return (isinstance(e, Const) and e.dtype.is_floating_point) or (isinstance(e, Int) and bool(e.value.is_Integer))


def le(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const):
        return constant(a.value <= b.value, torch.bool)
    if isinstance(a, Int) and isinstance(b, Int):
        slack = sympy.expand(b.value - a.value)
        if slack.is_nonnegative:
            return TRUE
        if slack.is_negative:
            return FALSE
    return _chosen(le, a, b) or Call("le", (a, b), torch.bool)


def lt(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int):
        return le(Int(a.value + 1), b)
    if isinstance(a, Const) and isinstance(b, Const):
        return constant(a.value < b.value, torch.bool)
    return _chosen(lt, a, b) or Call("lt", (a, b), torch.bool)


def ge(a: Expr, b: Expr) -> Expr:
    return le(b, a)


def gt(a: Expr, b: Expr) -> Expr:
    return lt(b, a)


def eq(a: Expr, b: Expr) -> Expr:
    if a == b and not a.dtype.is_floating_point:
        return TRUE
    if isinstance(a, Int) and isinstance(b, Int):
        difference = sympy.expand(a.value - b.value)
        if difference.is_zero:
            return TRUE
        if difference.is_nonzero:
            return FALSE
    if a.dtype == torch.bool and (isinstance(b, Const) or (isinstance(b, Int) and b.value.is_Integer)):
        return a if is_number(b, 1) else logical_not(a) if is_number(b, 0) else FALSE
    if isinstance(a, Const) and isinstance(b, Const):
        return constant(a.value == b.value, torch.bool)
    return _chosen(eq, a, b) or Call("eq", (a, b), torch.bool)


def ne(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Call) and a.op == "cast" and a.args[0].dtype == torch.bool:
        a = a.args[0]
    same = eq(a, b)
    if isinstance(same, Call) and same.op == "eq":
        return Call("ne", same.args, torch.bool)
    return logical_not(same)


def _is_float(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.is_floating_point


def rebuild(e: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """``e`` with every node that ``leaf`` answers for replaced, and the rest rebuilt through the folding constructors."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            answer = leaf(node)
            if answer is None:
                answer = _remake(node, tuple(visit(c) for c in children(node)))
            memo[node] = answer
        return memo[node]

    return visit(e)


def substitute(e: Expr, mapping: dict[sympy.Symbol, sympy.Expr]) -> Expr:
    """``e`` with integer symbols replaced (floor-division and modulo are simplified again)."""
    from attnfx.algebra.integers import replace

    return rebuild(e, lambda n: Int(replace(n.value, mapping)) if isinstance(n, Int) else None)


def _remake(node: Expr, args: tuple[Expr, ...]) -> Expr:
    if isinstance(node, Load):
        return Load(node.slot, args, node.dtype)
    if not isinstance(node, Call) or args == node.args:
        return node
    if node.op in ("and", "or") and node.dtype == torch.bool:
        return (logical_and if node.op == "and" else logical_or)(*args)
    plain: dict[str, Callable[..., Expr]] = {"le": le, "lt": lt, "eq": eq, "ne": ne, "not": logical_not}
    if node.op in plain:
        return plain[node.op](*args)
    if node.op == "cast":
        return cast(args[0], node.dtype)
    makers: dict[str, Callable[..., Expr]] = {
        "add": add, "sub": sub, "mul": mul, "div": div, "floordiv": floordiv, "mod": mod, "min": minimum,
        "max": maximum, "where": where,
    }  # fmt: skip
    return makers[node.op](*args, dtype=node.dtype) if node.op in makers else Call(node.op, args, node.dtype)
