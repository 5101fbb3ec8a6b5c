"""Lifting rules of operations that compute: generators, element-wise arithmetic, comparisons, selection, casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, Int
from attnfx.graphs.mirror import is_tensor
from attnfx.patterns.lift import Index, Lifter, operation, rule
from attnfx.patterns.lift_moves import argument, integer_of


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


# Generators -----------------------------------------------------------------------------------------------------------


@rule("aten.arange")
def _arange(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    overload = str(node.target).rsplit(".", 1)[-1]
    start = node.args[0] if overload != "default" else 0
    step = node.args[2] if overload == "start_step" and len(node.args) > 2 else 1
    if any(isinstance(x, float) and not x.is_integer() for x in (start, step)):
        return None
    begin, by = (integer_of(int(x) if isinstance(x, float) else x) for x in (start, step))
    made = Int(begin) + index[0] * Int(by)
    if not _dtype(node).is_floating_point:
        return None if wraps(lifter, made, _dtype(node)) else made
    return expr.cast(made, _dtype(node)) if exact_in(lifter, made, torch.float32) else None


def _filled(value: Any) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        return expr.constant(value, _dtype(node))

    return apply


rule("aten.ones", "aten.ones_like", "aten.new_ones")(_filled(1))
rule("aten.zeros", "aten.zeros_like", "aten.new_zeros")(_filled(0))


@rule("aten.full", "aten.full_like", "aten.new_full")
def _full(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    value = argument(node, 2 if operation(node) == "aten.new_full" else 1, "fill_value")
    if isinstance(value, fx.Node):
        return expr.cast(lifter.scalar(value), _dtype(node)) if not is_tensor(value) else None
    return None if value != value else expr.constant(value, _dtype(node))


@rule("aten.scalar_tensor")
def _scalar_tensor(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    value = node.args[0]
    return None if isinstance(value, fx.Node) or value != value else expr.constant(value, _dtype(node))  # type: ignore[arg-type]


@rule("aten.eye")
def _eye(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return expr.cast(expr.eq(index[0], index[1]), _dtype(node))


@rule("aten.tril", "aten.triu", "aten.tril_", "aten.triu_")
def _triangle(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    diagonal = Int(integer_of(argument(node, 1, "diagonal", 0)))
    row, column = index[-2:]
    lower = operation(node).startswith("aten.tril")
    inside = expr.le(column, row + diagonal) if lower else expr.le(row + diagonal, column)
    source = lifter.element(node.args[0], index)
    return expr.where(inside, source, expr.constant(0, _dtype(node)), _dtype(node))


# Arithmetic -----------------------------------------------------------------------------------------------------------


#: Sizes known only at run time are taken to be below this where an overflow of int32 is ruled out.
LARGEST_SIZE = 2**24


def wraps(lifter: Lifter, e: Expr, dtype: torch.dtype) -> bool:
    """Whether ``e``, exact in int64, may overflow in the narrower integer type that the model computes it in."""
    if dtype.is_floating_point or dtype.is_complex or dtype in (torch.bool, torch.int64):
        return False
    flags: dict[Expr, sympy.Symbol] = {}

    def flag(node: Expr) -> Expr | None:
        if isinstance(node, expr.Call) and node.op == "cast" and node.args[0].dtype == torch.bool:
            return Int(flags.setdefault(node, sympy.Dummy("flag", integer=True, nonnegative=True)))
        return None

    e = expr.rebuild(e, flag)
    if not isinstance(e, Int):
        return True
    info, known = torch.iinfo(dtype), lifter.ranges
    free = e.value.free_symbols | {s for bound in known.high.values() for s in bound.free_symbols}
    ones = dict.fromkeys(flags.values(), sympy.Integer(1))
    ranges = Ranges(known.low, {**dict.fromkeys(free, sympy.Integer(LARGEST_SIZE)), **known.high, **ones})
    return not (ranges.nonnegative(e.value - info.min) and ranges.nonnegative(info.max - e.value))


def exact_in(lifter: Lifter, e: Expr, dtype: torch.dtype) -> bool:
    """Whether a float ``dtype`` is proved to hold every value of the integer ``e``."""
    if not isinstance(e, Int):
        return False
    most = 2 ** (1 - round(math.log2(torch.finfo(dtype).eps)))
    return lifter.ranges.nonnegative(e.value + most) and lifter.ranges.nonnegative(most - e.value)


def _binary(make: Callable[..., Expr]) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        a, b = (lifter.broadcast(x, index) for x in node.args[:2])
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            b = expr.mul(b, lifter.element(alpha, ()), _dtype(node))
        return make(*_aligned(a, b, _dtype(node)), dtype=_dtype(node))

    return _unwrapped(apply)


def _unwrapped(rule_of: Callable[[Lifter, fx.Node, Index], Expr | None]) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    """The rule, except where its integers may overflow: the model's own result is loaded there."""

    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        found = rule_of(lifter, node, index)
        return None if found is None or wraps(lifter, found, _dtype(node)) else found

    return apply


def _aligned(a: Expr, b: Expr, dtype: torch.dtype) -> tuple[Expr, Expr]:
    """Operands of an integer or float operation: booleans become numbers, number constants take the result's dtype."""
    if dtype == torch.bool:
        return a, b

    def fit(x: Expr) -> Expr:
        if x.dtype == torch.bool:
            return expr.cast(x, dtype)
        if dtype.is_floating_point and (isinstance(x, expr.Const) or (isinstance(x, Int) and x.value.is_Integer)):
            # Python numbers enter an operation on halves in float32 and are rounded only with its result.
            return expr.cast(x, dtype if dtype.itemsize > 2 else torch.float32)
        return x

    return fit(a), fit(b)


for _name, _make in (
    ("add", expr.add), ("sub", expr.sub), ("mul", expr.mul), ("minimum", expr.minimum), ("maximum", expr.maximum),
    ("remainder", expr.mod), ("floor_divide", expr.floordiv),
):  # fmt: skip
    rule(f"aten.{_name}", f"aten.{_name}_")(_binary(_make))


@rule("aten.min", "aten.max")
def _extremum(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if not str(node.target).endswith(".other"):
        return None
    return _binary(expr.minimum if operation(node) == "aten.min" else expr.maximum)(lifter, node, index)


@rule("aten.rsub")
def _rsub(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if argument(node, 2, "alpha", 1) != 1:
        return None
    b, a = (lifter.broadcast(x, index) for x in node.args[:2])
    return expr.sub(*_aligned(a, b, _dtype(node)), dtype=_dtype(node))


@rule("aten.div", "aten.div_", "aten.true_divide")
def _divide(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    a, b = (lifter.broadcast(x, index) for x in node.args[:2])
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor" and not _dtype(node).is_floating_point:
        return expr.floordiv(a, b, _dtype(node))
    if mode == "trunc" and not _dtype(node).is_floating_point:
        from attnfx.patterns.lift_bits import truncated

        return truncated(lifter, *_aligned(a, b, _dtype(node)))
    if mode is None:
        return expr.div(*_aligned(a, b, _dtype(node)), dtype=_dtype(node))
    if mode == "floor":
        return expr.floordiv(*_aligned(a, b, _dtype(node)), _dtype(node))
    if _dtype(node).itemsize < 4:
        return None  # a quotient rounded to a half first may be another integer
    return expr.call("trunc", expr.div(*_aligned(a, b, _dtype(node)), dtype=_dtype(node)), dtype=_dtype(node))


@rule("aten.pow", "aten.pow_")
def _power(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    a, b = (lifter.broadcast(x, index) for x in node.args[:2])
    if isinstance(a, Int) and isinstance(b, Int) and b.value.is_Integer and 0 <= int(b.value) <= 16:
        return Int(sympy.expand(a.value ** int(b.value)))
    return expr.call("pow", *_aligned(a, b, _dtype(node)), dtype=_dtype(node)) if _dtype(node).is_floating_point else None


def _unary(op: str) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        x = lifter.element(node.args[0], index)
        if op == "neg" and isinstance(x, Int):
            return None if wraps(lifter, Int(-x.value), _dtype(node)) else Int(-x.value)
        if op == "abs" and isinstance(x, Int) and lifter.ranges.nonnegative(x.value):
            return x
        if op not in ("neg", "abs") and not x.dtype.is_floating_point:
            x = expr.cast(x, _dtype(node))
        return expr.call(op, x, dtype=_dtype(node))

    return apply


for _name in ("neg", "abs", "exp", "exp2", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "floor", "sigmoid"):
    rule(f"aten.{_name}", f"aten.{_name}_")(_unary(_name))


@rule("aten.clamp", "aten.clamp_", "aten.clamp_min", "aten.clamp_max", "aten.clamp_min_", "aten.clamp_max_")
def _clamp(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    name = operation(node)
    low = None if "clamp_max" in name else argument(node, 1, "min")
    high = argument(node, 1, "max") if "clamp_max" in name else argument(node, 2, "max")
    x = lifter.element(node.args[0], index)
    for bound, make in ((low, expr.maximum), (high, expr.minimum)):
        if bound is not None:
            x = make(*_aligned(x, lifter.broadcast(bound, index), _dtype(node)), dtype=_dtype(node))
    return x


# Comparison and logic -------------------------------------------------------------------------------------------------


def _compare(name: str) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        a, b = (lifter.broadcast(x, index) for x in node.args[:2])
        a, b = _comparable(a, b), _comparable(b, a)
        if name in ("eq", "ne"):
            return (expr.eq if name == "eq" else expr.ne)(a, b)
        if name in ("gt", "ge"):
            a, b = b, a
        if isinstance(a, Int) and isinstance(b, Int):
            return lifter.less(a, b if name in ("lt", "gt") else b + 1)
        return (expr.lt if name in ("lt", "gt") else expr.le)(a, b)

    return apply


#: Both names of each comparison.
COMPARISONS = (
    ("lt", "less"),
    ("le", "less_equal"),
    ("gt", "greater"),
    ("ge", "greater_equal"),
    ("eq", "eq"),
    ("ne", "not_equal"),
)
for _name, _other in COMPARISONS:
    rule(f"aten.{_name}", f"aten.{_other}")(_compare(_name))


def _comparable(x: Expr, other: Expr) -> Expr:
    """A Python float in the dtype that it is compared in."""
    if not (isinstance(x, expr.Const) and x.dtype == torch.float64):
        return x
    return expr.cast(x, other.dtype if other.dtype.is_floating_point else torch.float32)


def _logic(make: Callable[..., Expr]) -> Callable[[Lifter, fx.Node, Index], Expr | None]:
    def apply(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
        if _dtype(node) != torch.bool:
            return None
        return make(*(expr.cast(lifter.broadcast(x, index), torch.bool) for x in node.args[:2]))

    return apply


_AND = (
    "aten.__and__",
    "aten.logical_and",
    "aten.bitwise_and",
    "aten.__iand__",
    "aten.logical_and_",
    "aten.bitwise_and_",
)
_OR = ("aten.__or__", "aten.logical_or", "aten.bitwise_or", "aten.__ior__", "aten.logical_or_", "aten.bitwise_or_")
rule(*_AND)(_logic(expr.logical_and))
rule(*_OR)(_logic(expr.logical_or))
rule("aten.__xor__", "aten.logical_xor", "aten.bitwise_xor")(_logic(lambda a, b: expr.call("xor", a, b, dtype=torch.bool)))


@rule("aten.logical_not", "aten.bitwise_not", "aten.logical_not_", "aten.bitwise_not_")
def _not(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lifter.element(node.args[0], index)
    if _dtype(node) == torch.bool:
        return expr.logical_not(expr.cast(x, torch.bool))
    if "logical" in operation(node):
        return None
    found = Int(-x.value - 1) if isinstance(x, Int) else expr.sub(expr.call("neg", x), expr.integer(1))
    return None if wraps(lifter, found, _dtype(node)) else found


@rule("aten.where")
def _where(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if len(node.args) < 3:
        return None
    condition, a, b = (lifter.broadcast(x, index) for x in node.args)
    return expr.where(expr.cast(condition, torch.bool), *_fitted(a, b, _dtype(node)), _dtype(node))


def _fitted(a: Expr, b: Expr, dtype: torch.dtype) -> tuple[Expr, Expr]:
    return (a if isinstance(a, Int) and not dtype.is_floating_point else expr.cast(a, dtype)), (
        b if isinstance(b, Int) and not dtype.is_floating_point else expr.cast(b, dtype)
    )


@rule("aten.masked_fill", "aten.masked_fill_")
def _masked_fill(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, mask, value = node.args[:3]
    if isinstance(value, float) and value != value:
        return None
    a = lifter.broadcast(value, index)
    b = lifter.broadcast(source, index)
    return expr.where(lifter.broadcast(mask, index), *_fitted(a, b, _dtype(node)), _dtype(node))


@rule("aten.isnan")
def _isnan(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lifter.element(node.args[0], index)
    return expr.ne(x, x)


@rule("aten.nan_to_num", "aten.nan_to_num_")
def _nan_to_num(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    dtype = _dtype(node)
    if not dtype.is_floating_point:
        return None
    x = lifter.element(node.args[0], index)
    given = [argument(node, 1, "nan"), argument(node, 2, "posinf"), argument(node, 3, "neginf")]
    defaults = (0.0, torch.finfo(dtype).max, torch.finfo(dtype).min)
    nan, high, low = (expr.constant(d if g is None else g, dtype) for g, d in zip(given, defaults, strict=True))
    clamped = expr.minimum(expr.maximum(x, low, dtype), high, dtype)
    return expr.where(expr.ne(x, x), nan, clamped, dtype)


@rule("aten.dropout", "aten.dropout_")
def _dropout(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    active = bool(argument(node, 2, "train", False)) and argument(node, 1, "p", 0.5) != 0
    return lifter.element(node.args[0], index) if not active or node in lifter.course else None


@rule("aten.to", "aten._to_copy", "aten.type_as", "aten.to_dtype")
def _convert(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.meta["val"].device != node.meta["val"].device:
        return _across(lifter, node, source, index)
    return _converted(lifter, lifter.element(source, index), _dtype(node))


def _converted(lifter: Lifter, x: Expr, dtype: torch.dtype) -> Expr | None:
    """``x`` as another type; None where a narrower integer type may not hold it, or an eight-bit float rounds it coarsely."""
    if dtype.is_floating_point and dtype.itemsize == 1:
        return None
    return None if isinstance(x, Int) and wraps(lifter, x, dtype) else expr.cast(x, dtype)


def _across(lifter: Lifter, node: fx.Node, source: fx.Node, index: Index) -> Expr | None:
    """A copy to another device is followed only for formulas: a load has to come from the device of the attention."""
    found = _converted(lifter, lifter.element(source, index), _dtype(node))
    return None if found is None or any(isinstance(n, expr.Load) for n in expr.walk(found)) else found


@rule("aten.float", "aten.bool", "aten.half", "aten.int", "aten.long")
def _convert_method(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return _converted(lifter, lifter.element(node.args[0], index), _dtype(node))
