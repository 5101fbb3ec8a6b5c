"""Expressions typeset as MathML, which browsers draw without a script: the same letters as in :mod:`attnfx.sites.notation`."""

from __future__ import annotations

from html import escape

import sympy

from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.expr import Call, Const, Expr, Int, Load, Score
from attnfx.sites.notation import number, short

#: The sign and the precedence of what stands between its operands.
_INFIX = {
    "add": ("+", 4), "sub": ("−", 4), "mul": ("·", 5), "mod": ("mod", 5), "lt": ("<", 3), "le": ("≤", 3), "eq": ("=", 3),
    "ne": ("≠", 3), "and": ("∧", 2), "or": ("∨", 1), "xor": ("⊕", 1),
}  # fmt: skip
_FENCES = {"abs": ("|", "|"), "floor": ("⌊", "⌋"), "ceil": ("⌈", "⌉")}


def identifier(text: str) -> str:
    return f"<mi>{escape(text)}</mi>"


def sign(text: str) -> str:
    return f"<mo>{escape(text)}</mo>"


def words(text: str) -> str:
    return f"<mtext>{escape(text)}</mtext>"


def row(*parts: str) -> str:
    return f"<mrow>{''.join(parts)}</mrow>"


def sub(base: str, below: str) -> str:
    return f"<msub>{base}{below}</msub>"


def fraction(above: str, below: str) -> str:
    return f"<mfrac>{above}{below}</mfrac>"


def bracketed(inner: str, left: str = "(", right: str = ")") -> str:
    return row(sign(left), inner, sign(right))


def called(name: str, *arguments: str) -> str:
    """A function of arguments."""
    listed = [part for k, a in enumerate(arguments) for part in ((sign(","), a) if k else (a,))]
    return row(f'<mi mathvariant="normal">{escape(name)}</mi>', bracketed(row(*listed)))


def dot(band: bool = False) -> str:
    """The product of a query and a key."""
    product = row(sub(identifier("q"), identifier("i")), sign("·"), sub(identifier("k"), identifier("j")))
    return row(product, sign("+"), sub(identifier("r"), row(identifier("i"), identifier("j")))) if band else product


def typeset(e: Expr, outer: int = 0, score: str | None = None) -> str:
    """``e`` inside of an operation of precedence ``outer``; ``score`` is what stands for the product of query and key."""
    if isinstance(e, Int):
        return _integer(e.value, outer)
    if isinstance(e, Const):
        return _constant(e.value)
    if isinstance(e, Score):
        text = dot() if score is None else score
        return text if outer < 5 else bracketed(text)
    if isinstance(e, Load):
        name = sub(identifier("T"), f"<mn>{e.slot}</mn>") if isinstance(e.slot, int) else identifier(str(e.slot))
        at = [part for k, x in enumerate(e.indices) for part in ((sign(","),) if k else ()) + (typeset(x, 0, score),)]
        return row(name, bracketed(row(*at), "[", "]")) if at else name
    assert isinstance(e, Call)
    return _call(e, outer, score)


def _call(e: Call, outer: int, score: str | None) -> str:
    arguments = e.args
    if e.op in _INFIX:
        mark, level = _INFIX[e.op]
        parts: list[str] = []
        for k, a in enumerate(arguments):
            parts += [*([sign(mark)] if k else []), typeset(a, level + (k > 0 and e.op in ("sub", "mod")), score)]
        return _within(row(*parts), level, outer)
    inner = [typeset(a, 0, score) for a in arguments]
    if e.op == "div":
        return fraction(*inner)
    if e.op == "floordiv":
        return bracketed(fraction(*inner), "⌊", "⌋")
    if e.op == "not":
        return row(sign("¬"), typeset(arguments[0], 6, score))
    if e.op == "neg":
        return _within(row(sign("−"), typeset(arguments[0], 5, score)), 4, outer)
    if e.op in _FENCES:
        return bracketed(inner[0], *_FENCES[e.op])
    if e.op == "sqrt":
        return f"<msqrt>{inner[0]}</msqrt>"
    if e.op == "exp":
        return f"<msup>{identifier('e')}{inner[0]}</msup>"
    if e.op == "pow":
        return f"<msup>{typeset(arguments[0], 9, score)}{inner[1]}</msup>"
    if e.op == "cast":
        return called(short(e.dtype), inner[0])
    if e.op == "where":
        rows = ((inner[1], row(words("if "), inner[0])), (inner[2], words("otherwise")))
        cells = "".join(f"<mtr><mtd>{value}</mtd><mtd>{when}</mtd></mtr>" for value, when in rows)
        return f'<mtable class="cases">{cells}</mtable>'
    return called(e.op, *inner)


def _within(text: str, level: int, outer: int) -> str:
    return bracketed(text) if level < outer else text


def _constant(value: float | bool) -> str:
    text = number(value)
    if text.startswith("min("):
        return called("min", words(text[4:-1]))
    minus, digits = text.startswith("-"), text.removeprefix("-")
    body = f"<mn>{escape(digits)}</mn>" if digits[0].isdigit() else identifier(digits)
    return row(sign("−"), body) if minus else body


def integer(value: object) -> str:
    """A size."""
    return _integer(sympy.sympify(value), 0)


def _integer(e: sympy.Expr, outer: int) -> str:
    if e.is_Symbol:
        return identifier(str(e))
    if e.is_Integer:
        return f"<mn>{e}</mn>" if e >= 0 else _within(row(sign("−"), f"<mn>{-e}</mn>"), 4, outer)
    if isinstance(e, FloorDiv):
        return bracketed(fraction(*(_integer(a, 0) for a in e.args)), "⌊", "⌋")
    if isinstance(e, Mod | PythonMod):
        return _within(row(_integer(e.args[0], 6), sign("mod"), _integer(e.args[1], 6)), 5, outer)
    if e.is_Rational:
        return fraction(_integer(sympy.Integer(e.p), 0), f"<mn>{e.q}</mn>")
    if isinstance(e, Max | Min | sympy.Max | sympy.Min):
        return called("max" if isinstance(e, Max | sympy.Max) else "min", *(_integer(a, 0) for a in sorted(e.args, key=str)))
    if e.is_Add:
        terms = sorted(sympy.Add.make_args(e), key=lambda t: (bool(t.could_extract_minus_sign()), bool(t.is_number), str(t)))
        parts = [_integer(terms[0], 4)]
        for t in terms[1:]:
            minus = bool(t.could_extract_minus_sign())
            parts += [sign("−" if minus else "+"), _integer(-t if minus else t, 5)]
        return _within(row(*parts), 4, outer)
    if e.is_Mul and e.could_extract_minus_sign():
        return _within(row(sign("−"), _integer(-e, 5)), 4, outer)
    if e.is_Mul:
        parts = [part for k, a in enumerate(e.args) for part in ((sign("·"),) if k else ()) + (_integer(a, 5),)]
        return _within(row(*parts), 5, outer)
    if e.is_Pow:
        return f"<msup>{_integer(e.args[0], 9)}{_integer(e.args[1], 0)}</msup>"
    return words(str(e))
