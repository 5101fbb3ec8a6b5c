"""Evaluation of index expressions with torch: every element of a (broadcast) grid of indices at once, differentiable in
what it loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
import torch

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.expr import INDEX, Call, Const, Expr, Int, Load, Score

Value = torch.Tensor | int | float | bool

_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "tanh": torch.tanh, "sin": torch.sin, "cos": torch.cos, "floor": torch.floor, "sigmoid": torch.sigmoid,
    "log2": torch.log2, "log1p": torch.log1p, "erf": torch.erf, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round,
    "bitand": torch.bitwise_and, "bitor": torch.bitwise_or, "bitxor": torch.bitwise_xor, "not": torch.logical_not,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.true_divide,
    "floordiv": torch.floor_divide, "mod": torch.remainder, "pow": torch.pow, "min": torch.minimum, "max": torch.maximum,
    "xor": torch.logical_xor, "lt": torch.lt, "le": torch.le, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip


def evaluate(
    e: Expr,
    grid: Mapping[str, torch.Tensor],
    loads: Sequence[torch.Tensor],
    sizes: Mapping[sympy.Symbol, Value],
    *,
    score: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    known: Mapping[Expr, torch.Tensor] | None = None,
    clamp: bool = False,
) -> torch.Tensor:
    """The value of ``e`` on ``grid`` (index name -> integer tensor, broadcastable against one another).

    ``sizes`` are the values of its other symbols, ``score`` is that of :class:`Score`. ``dtype`` replaces every floating dtype of
    the formula (an oracle in float64); None computes each operation in its own dtype, as the model does. ``known`` holds values
    found some faster way.
    ``clamp`` moves indices into range, as a formula needs whose loads are only meant in one branch of a choice.
    """
    device = next(iter(grid.values())).device
    memo: dict[Expr, torch.Tensor] = dict(known or {})
    numbers: dict[sympy.Symbol, Value] = {INDEX[name]: tensor for name, tensor in grid.items()}
    numbers.update(sizes)

    def real(t: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and t.is_floating_point else t

    def visit(node: Expr) -> torch.Tensor:
        if node not in memo:
            memo[node] = compute(node)
        return memo[node]

    def compute(node: Expr) -> torch.Tensor:
        if dtype is not None and _discrete(node):
            return evaluate(node, grid, loads, sizes, clamp=clamp)
        if isinstance(node, Score):
            assert score is not None, "the expression has a score, and none was given"
            return score
        if isinstance(node, Int):
            return _tensor(integer(node.value, numbers), torch.int64, device)
        if isinstance(node, Const):
            return torch.full((), node.value, dtype=real(node.dtype), device=device)
        if isinstance(node, Load):
            assert isinstance(node.slot, int)
            source = loads[node.slot]
            at = [visit(x) for x in node.indices]
            if clamp:
                at = [x.clamp(0, n - 1) for x, n in zip(at, source.shape, strict=True)]
            found = _picked(source, at) if at else source
            return found.to(real(source.dtype))
        assert isinstance(node, Call)
        args = [visit(a) for a in node.args]
        if node.op == "cast":
            return args[0].to(real(node.dtype))
        if node.op == "where":
            return torch.where(args[0], args[1].to(real(node.dtype)), args[2].to(real(node.dtype)))
        if node.op in ("and", "or"):
            join = torch.logical_and if node.op == "and" else torch.logical_or
            total = args[0]
            for a in args[1:]:
                total = join(total, a)
            return total
        if node.op == "pow" and node.dtype.is_floating_point:
            # torch knows 2.0, 0.5 and the like only as Python numbers
            base, exponent = (_python_number(x) for x in node.args)
            if exponent is not None and base is None:
                return torch.pow(args[0].to(real(node.dtype)), exponent)
            if base is not None and exponent is None:
                return torch.pow(base, args[1].to(real(node.dtype)))
        if node.dtype.is_floating_point and node.op not in expr.COMPARE:
            half = real(node.dtype).itemsize < 4
            if half and any(a.dtype == torch.float32 for a in args):
                # a Python number beside halves: torch computes such a step in float32 and rounds its result
                return _FUNCTIONS[node.op](*(a.float() for a in args)).to(real(node.dtype))
            args = [a.to(real(node.dtype)) for a in args]
        return _FUNCTIONS[node.op](*args)

    found = visit(e)
    memo.clear()  # the functions above refer to one another: their tensors would wait for Python's collector of cycles
    return found


def _discrete(e: Expr) -> bool:
    """Whether floats become integers or bools here: in the model's own dtype, or an oracle would pick other buckets."""
    if not isinstance(e, Call) or e.dtype.is_floating_point or not any(a.dtype.is_floating_point for a in e.args):
        return False
    return not any(isinstance(n, Score) for n in expr.walk(e))


def _python_number(e: Expr) -> float | None:
    if isinstance(e, Const):
        return float(e.value)
    return float(int(e.value)) if isinstance(e, Int) and e.value.is_Integer else None


def _tensor(value: Value, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=dtype, device=device)


def integer(e: sympy.Expr, numbers: Mapping[sympy.Symbol, Value]) -> Value:
    """A sympy integer expression with numbers or integer tensors for its symbols."""
    if e.is_Symbol:
        return numbers[e]
    if e.is_Integer:
        return int(e)
    args = [integer(a, numbers) for a in e.args]
    if isinstance(e, FloorDiv):
        return args[0] // args[1]
    if isinstance(e, Mod | PythonMod):
        return args[0] % args[1]
    if e.is_Pow:
        return args[0] ** args[1]
    total = args[0]
    for a in args[1:]:
        total = _larger(total, a, isinstance(e, Max)) if isinstance(e, Max | Min) else total + a if e.is_Add else total * a
    if not (e.is_Add or e.is_Mul or isinstance(e, Max | Min)):
        raise ValueError(f"cannot evaluate the integer expression {e}")
    return total


def _larger(a: Value, b: Value, larger: bool) -> Value:
    """The larger of two integers, or the smaller one; numbers known at run time only are not asked for their values."""
    if not isinstance(a, torch.Tensor):
        a, b = b, a
    if not isinstance(a, torch.Tensor):
        symbolic: Callable[[Value, Value], Value] = torch.sym_max if larger else torch.sym_min
        return symbolic(a, b)
    if isinstance(b, torch.Tensor):
        return torch.maximum(a, b) if larger else torch.minimum(a, b)
    return a.clamp(min=b) if larger else a.clamp(max=b)


def grid_of(batch: int, heads: int, rows: range, columns: range, device: torch.device) -> dict[str, torch.Tensor]:
    """Index tensors of a block of queries and keys, shaped to broadcast as (b, h, i, j)."""

    def axis(first: int, past: int, place: int) -> torch.Tensor:
        shape = [1, 1, 1, 1]
        shape[place] = -1
        return torch.arange(first, past, device=device).view(shape)

    return {
        "b": axis(0, batch, 0),
        "h": axis(0, heads, 1),
        "i": axis(rows.start, rows.stop, 2),
        "j": axis(columns.start, columns.stop, 3),
    }


def _picked(source: torch.Tensor, at: Sequence[torch.Tensor]) -> torch.Tensor:
    """``source[at]``; an index without axes stays a tensor, and is never asked for its number."""
    picked = source[tuple(x.unsqueeze(0) if x.dim() == 0 else x for x in at)]
    return picked.squeeze(0) if all(x.dim() == 0 for x in at) else picked
