"""Expressions as lines of a `@triton.jit` function's body. Text only: nothing here needs Triton."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

import sympy
import torch

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod, Ranges
from attnfx.algebra.nodes import has_score
from attnfx.expr import INDEX, Call, Const, Expr, Int, Load, Score, children
from attnfx.lowering.comparisons import parted
from attnfx.lowering.tables import KEYS

LOG2E = math.log2(math.e)
#: Below any real score, above finfo.min of float32 and bfloat16 divided by log2(e): templates/arithmetic.py says so too.
MASKED_OUT = -1e38
#: Longer text becomes a line of its own.
INLINE = 60

_NARROW = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
#: What templates/arithmetic.py reads straight into registers.
_GATHERED = frozenset((torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16))
_BINARY = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^", "lt": "<", "le": "<=", "eq": "==",
    "ne": "!=", "bitand": "&", "bitor": "|", "bitxor": "^",
}  # fmt: skip
_FUNCTION = {
    "abs": "tl.abs", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt", "sin": "tl.sin",
    "cos": "tl.cos", "log2": "tl.log2", "erf": "tl.erf",
    "floor": "tl.floor", "ceil": "tl.ceil", "tanh": "tanh", "sigmoid": "sigmoid", "min": "tl.minimum", "max": "tl.maximum",
}  # fmt: skip
#: Functions without a counterpart in Triton, of a line {x} and a line {y} for what `_INNER` says.
_SPELLED_OUT = {
    "trunc": "tl.where({x} < 0.0, tl.ceil({x}), tl.floor({x}))",
    # halves go to the even neighbour
    "round": "tl.where({x} - {y} < 0.5, tl.where({y} == 0.0, {x} * 0.0, {y}), "
    "tl.where({x} - {y} > 0.5, tl.where({y} == -1.0, {x} * 0.0, {y} + 1.0), tl.floor(({y} + 1.0) * 0.5) * 2.0))",
    # log(y) * x / (y - 1) makes up for what 1 + x lost (Kahan); at both ends of the range it is not needed
    "log1p": "tl.where({y} == 1.0, {x}, tl.where({y} - 1.0 == {x}, tl.log({y}), tl.log({y}) * ({x} / ({y} - 1.0))))",
}
_INNER = {"round": "tl.floor({x})", "log1p": "1.0 + {x}"}
#: The functions of templates/arithmetic.py that a body may call.
HELPERS = ("float_modulo", "floor_divide", "floor_modulo", "gathered", "rounded", "sigmoid", "tanh", "to_base_2")


class Unprintable(Exception):
    """An operation that has no Triton form here; the message is a sentence."""


class Body:
    """The body of one function. ``pointers``: place of each slot in `loads`; ``numbers``: place of each symbol in `ints`;
    ``strides``: place in `ints` of the first stride of each slot; ``ranges``: what is known of the symbols."""

    def __init__(
        self, pointers: Mapping[int, int], numbers: Mapping[sympy.Symbol, int], strides: Mapping[int, int], ranges: Ranges
    ) -> None:
        self.pointers, self.numbers, self.strides, self.ranges = pointers, numbers, strides, ranges
        self.lines: list[str] = []
        self.names: dict[Expr, str] = {}
        self.uses: Counter[Expr] = Counter()
        #: Quotients that a step behind them makes whole numbers of: their last bit decides which.
        self.precise: set[Expr] = set()
        #: The names of further integers.
        self.positions: Mapping[sympy.Symbol, str] = {}
        #: Whether steps of the scores round to their own dtypes, too.
        self.typed = False
        #: Whether a term's finfo.min must stay finite in base 2; not where rows of nothing but masks are computed again.
        self.masks = True
        #: Slots whose numbers hold no mask, although they differ from key to key.
        self.unmasked: frozenset[int] = frozenset()
        #: Slots that are given in base 2 and stand nowhere but in the sum of the logits.
        self.in_base_2: frozenset[int] = frozenset()
        #: Whether all keys are one tile.
        self.short = False
        #: Slots of tables of distances, which are given from their middle on.
        self.distances: frozenset[int] = frozenset()
        #: Symbols that are parameters of the function; whether all integers are computed in int64.
        self.named = {symbol: symbol.name for symbol in INDEX.values()}
        self.wide = False

    def count(self, root: Expr) -> None:
        """Learn which nodes of ``root`` are used more than once: those get a line of their own."""
        self.uses[root] += 1
        for node in expr.walk(root):
            self.uses.update(children(node))
            if isinstance(node, Call) and _discrete(node):
                self.precise.update(n for n in expr.walk(node) if isinstance(n, Call) and n.op == "div" and not has_score(n))

    def text(self, e: Expr) -> str:
        """An expression for ``e``: an atom or a parenthesised text, float values in float32."""
        if e not in self.names:
            text = self._text(e)
            if isinstance(e, Call | Load) and (self.uses[e] > 1 or len(text) > INLINE):
                self.lines.append(f"x{len(self.lines)} = {_bare(text)}")
                text = f"x{len(self.lines) - 1}"
            self.names[e] = text
        return self.names[e]

    def base_2(self, e: Expr) -> str:
        """``e`` (natural units) times log2(e), constants folded into the factors of its terms."""
        return self.scaled(e, LOG2E, masks=self.masks)

    def scaled(self, e: Expr, factor: float, masks: bool = False) -> str:
        """``e`` * ``factor`` for an ``e`` in working precision; ``masks``: ``factor`` is still that of :meth:`base_2`."""
        if isinstance(e, Call) and has_score(e):
            a = e.args[0]
            if e.op in ("add", "sub"):
                right = self.scaled(e.args[1], factor if e.op == "add" else -factor, masks and e.op == "add")
                return f"({self.scaled(a, factor, masks)} + {right})"
            step = _constant_factor(e)
            if step is not None:
                return self.scaled(step[0], factor * step[1])
        if isinstance(e, Load) and e.slot in self.in_base_2:
            return self.text(e)
        if masks and not has_score(e) and may_mask(e, self.unmasked):
            return f"to_base_2({_bare(self.text(e))})"
        number = _constant(e)
        if number is not None:
            return _float(number * factor)
        return self.text(e) if factor == 1.0 else f"({self.text(e)} * {_float(factor)})"

    def _text(self, e: Expr) -> str:
        if isinstance(e, Score):
            return "dot"
        if isinstance(e, Const):
            return str(bool(e.value)) if e.dtype == torch.bool else _float(float(e.value))
        if isinstance(e, Int):
            return self.integer(e.value)
        if isinstance(e, Load):
            return self._load(e)
        assert isinstance(e, Call)
        if has_score(e) and not self.typed and e.op in ("add", "sub", "mul", "div", "neg") and e.dtype.is_floating_point:
            folded = self._folded(e)
            if folded is not None:
                return folded
        text = self._call(e)
        if e.dtype in _NARROW and (self.typed or not has_score(e)):
            return f"rounded({_bare(text)}, {_NARROW[e.dtype]})"
        return text

    def _folded(self, e: Call) -> str | None:
        """A chain of constant factors as one factor."""
        value: Expr = e
        factor = 1.0
        while (step := _constant_factor(value)) is not None:
            value, factor = step[0], factor * step[1]
        if value is e:
            return None
        return self.text(value) if factor == 1.0 else f"({self.text(value)} * {_float(factor)})"

    def _call(self, e: Call) -> str:
        if e.op == "cast":
            return self._cast(e)
        if e.op in expr.COMPARE and (compared := parted(e)):
            texts = [f"({self.integer(left)} {_BINARY[e.op]} {self.integer(right)})" for left, right in compared]
            return texts[0] if len(texts) == 1 else f"({' & '.join(texts)})"
        floats = e.dtype.is_floating_point or (e.op in expr.COMPARE and any(a.dtype.is_floating_point for a in e.args))
        args = [self._as_float(a) if floats and not (e.op == "where" and n == 0) else self.text(a) for n, a in enumerate(e.args)]
        if self.typed and e.dtype in _NARROW:
            wide = [has_score(a) and a.dtype.is_floating_point and a.dtype not in _NARROW for a in e.args]
            args = [f"rounded({_bare(t)}, {_NARROW[e.dtype]})" if w else t for t, w in zip(args, wide, strict=True)]
        if e in self.precise and not _halves(e.args[1]):
            return f"tl.div_rn({', '.join(map(_bare, args))})"
        if e.op in _BINARY:
            return "(" + f" {_BINARY[e.op]} ".join(args) + ")"
        plain = [_bare(a) for a in args]
        if e.op == "where":
            return f"tl.where({', '.join(plain)})"
        if e.op == "neg":
            return f"(-{args[0]})"
        if e.op == "not":
            return f"({args[0]} == 0)"
        if e.op in ("floordiv", "mod"):
            return self._division(e, plain)
        if e.op == "pow":
            return self._power(e, args[0])
        if e.op in _SPELLED_OUT:
            x = self._named(plain[0])
            return _SPELLED_OUT[e.op].format(x=x, y=self._named(_INNER[e.op].format(x=x)) if e.op in _INNER else "")
        if e.op in ("min", "max") and e.dtype.is_floating_point:
            plain.append("propagate_nan=tl.PropagateNan.ALL")
        if e.op not in _FUNCTION:
            raise Unprintable(f"the operation {e.op} has no form in a Triton kernel here.")
        return f"{_FUNCTION[e.op]}({', '.join(plain)})"

    def _named(self, text: str) -> str:
        """The name of a line that holds ``text``."""
        self.lines.append(f"x{len(self.lines)} = {text}")
        return f"x{len(self.lines) - 1}"

    def _division(self, e: Call, args: list[str]) -> str:
        if not e.dtype.is_floating_point:
            return f"floor_{'divide' if e.op == 'floordiv' else 'modulo'}({', '.join(args)})"
        return f"tl.floor(tl.div_rn({args[0]}, {args[1]}))" if e.op == "floordiv" else f"float_modulo({', '.join(args)})"

    def _power(self, e: Call, base: str) -> str:
        exponent = _constant(e.args[1])
        if exponent == 0.5:
            return f"tl.sqrt({_bare(base)})"
        if exponent not in (1.0, 2.0, 3.0, 4.0):
            raise Unprintable(f"the exponent of a power is {e.args[1]}; a Triton kernel here takes the constants 0.5, 1, 2, 3, 4.")
        return "(" + " * ".join([base] * int(exponent)) + ")"

    def _cast(self, e: Call) -> str:
        inner, text = e.args[0], self.text(e.args[0])
        if e.dtype in _NARROW:
            return f"rounded({_bare(self._as_float(inner))}, {_NARROW[e.dtype]})"
        if e.dtype.is_floating_point:
            return self._as_float(inner)
        if e.dtype == torch.bool:
            return f"({text} != 0)"
        return f"tl.cast({_bare(text)}, tl.int64)"

    def _as_float(self, e: Expr) -> str:
        number = _constant(e)
        if number is not None:
            return _float(number)
        return self.text(e) if e.dtype.is_floating_point else f"tl.cast({_bare(self.text(e))}, tl.float32)"

    def _load(self, e: Load) -> str:
        assert isinstance(e.slot, int)
        first, terms = self.strides[e.slot], [f"loads[{self.pointers[e.slot]}]"]
        indices = e.indices
        if e.slot in self.distances:
            indices = (*indices[:-1], indices[-1] - (Int(KEYS) - 1))
        for axis, index in enumerate(indices):
            if not expr.is_number(index, 0):
                terms.append(f"tl.cast({_bare(self.text(index))}, tl.int64) * ints[{first + axis}]")
        text = f"{'gathered' if _direct(e, self.short) else 'tl.load'}({' + '.join(terms)})"
        if e.dtype == torch.bool:
            return f"({text} != 0)"
        return f"tl.cast({text}, tl.float32)" if e.dtype.is_floating_point else text

    def integer(self, e: sympy.Expr) -> str:
        """A sympy integer expression; in int64 where it multiplies sizes, which may pass 2**31."""
        wide = self.wide or any(len(_factors(t)) > 1 for t in sympy.preorder_traversal(e) if t.is_Mul or t.is_Pow)
        return self._integer(e, wide)

    def _integer(self, e: sympy.Expr, wide: bool) -> str:
        if e.is_Integer:
            return str(int(e)) if e >= 0 else f"({int(e)})"
        if e.is_Symbol:
            name = self.named[e] if e in self.named else self.positions.get(e) or f"ints[{self.numbers[e]}]"
            return f"tl.cast({name}, tl.int64)" if wide else name
        args = [self._integer(a, wide) for a in e.args]
        if isinstance(e, FloorDiv | Mod | PythonMod):
            simple = self.ranges.nonnegative(e.args[0]) and self.ranges.nonnegative(e.args[1] - 1)
            divide = isinstance(e, FloorDiv)
            if simple:
                return f"({args[0]} {'//' if divide else '%'} {args[1]})"
            return f"floor_{'divide' if divide else 'modulo'}({_bare(args[0])}, {_bare(args[1])})"
        if isinstance(e, Max | Min):
            text = args[0]
            for a in args[1:]:
                text = f"tl.{'maximum' if isinstance(e, Max) else 'minimum'}({_bare(text)}, {_bare(a)})"
            return text
        if e.is_Pow and e.args[1].is_Integer and 1 <= int(e.args[1]) <= 16:
            return "(" + " * ".join([args[0]] * int(e.args[1])) + ")"
        if e.is_Mul:
            return f"(-{args[1]})" if args[0] == "(-1)" and len(args) == 2 else "(" + " * ".join(args) + ")"
        if not e.is_Add:
            raise Unprintable(f"the integer expression {e} has no form in a Triton kernel here.")
        # positive terms first, numbers last, as one would write it
        ordered = sorted(e.args, key=lambda t: (t.is_Integer, t.could_extract_minus_sign(), str(t)))
        text = self._integer(ordered[0], wide)
        for term in ordered[1:]:
            negative = term.could_extract_minus_sign()
            text += f" {'-' if negative else '+'} {self._integer(-term if negative else term, wide)}"
        return f"({text})"


def _direct(e: Load, short: bool) -> bool:
    """Whether a tile is read straight into registers. What knows no key: such a read leaves the loop over keys. Of floats also
    what is read from places that are not runs of keys, as a table of distances is; one number for each key, of which a wait in
    the middle of a tile would keep Hopper's matrix products from overlapping; and all of it where all keys are one tile, which
    many examples may share."""
    if not expr.depends_on(e, "j"):
        return e.dtype in _GATHERED and expr.depends_on(e, "b", "h", "i")
    if not e.dtype.is_floating_point or e.dtype not in _GATHERED:
        return False
    return short or not expr.depends_on(e, "i") or e.indices[-1] != expr.index("j")


def _discrete(e: Call) -> bool:
    """Whether a small difference of an operand may change the result by a whole step."""
    if e.op in expr.COMPARE or (e.op == "cast" and not e.dtype.is_floating_point):
        return True
    return e.op in ("floor", "ceil", "trunc", "round") or (e.op in ("floordiv", "mod") and e.dtype.is_floating_point)


def _halves(e: Expr) -> bool:
    """Whether ``e`` is a constant power of two, by which nothing rounds."""
    number = _constant(e)
    return number is not None and number != 0 and math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5


def proportional(e: Expr) -> bool:
    """Whether ``e`` is a number times the score."""
    while (step := _constant_factor(e)) is not None:
        e = step[0]
    return isinstance(e, Score)


def _constant_factor(e: Expr) -> tuple[Expr, float] | None:
    """(x, c) where ``e`` is c * x with a constant c and an x that depends on the score."""
    if not isinstance(e, Call) or e.op not in ("mul", "div", "neg"):
        return None
    if e.op == "neg":
        return (e.args[0], -1.0) if has_score(e) else None
    left, right = _constant(e.args[0]), _constant(e.args[1])
    if has_score(e.args[0]) and right is not None and not (e.op == "div" and right == 0):
        return e.args[0], right if e.op == "mul" else 1.0 / right
    return (e.args[1], left) if e.op == "mul" and left is not None and has_score(e.args[1]) else None


def _factors(term: sympy.Expr) -> list[sympy.Expr]:
    """The symbols (or opaque parts) that a term multiplies, powers written out."""
    found = []
    for factor in sympy.Mul.make_args(term):
        if not factor.is_Number:
            found += [factor] * (int(factor.args[1]) if factor.is_Pow and factor.args[1].is_Integer else 1)
    return found


def may_mask(e: Expr, unmasked: Collection[int] = ()) -> bool:
    """Whether a term may hold a mask's finfo.min: a float loaded for each key, not from slots ``unmasked``, or such a constant."""
    for n in expr.walk(e):
        floats = isinstance(n, Load) and n.dtype.is_floating_point and n.slot not in unmasked
        if floats and any(expr.depends_on(x, "j") for x in children(n)):
            return True
        if isinstance(n, Const) and n.value < -1e30:
            return _constant(e) is None
    return False


def _constant(e: Expr) -> float | None:
    if isinstance(e, Const) and e.dtype != torch.bool:
        return float(e.value)
    return float(int(e.value)) if isinstance(e, Int) and e.value.is_Integer else None


def _float(value: float) -> str:
    if math.isinf(value):
        return f'float("{value}")'
    return repr(value) if value >= 0 else f"({value!r})"


def _bare(text: str) -> str:
    """``text`` without parentheses that enclose all of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for n, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if n == len(text) - 1 else text
    return text
