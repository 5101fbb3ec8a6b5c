"""Notation: expressions and sites as one line of mathematics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import sympy
import torch

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.expr import Call, Const, Expr, Int, Load, Score

if TYPE_CHECKING:
    from attnfx.site import AttentionSite
    from attnfx.sites.band import Band

_INFIX = {
    "add": (" + ", 4), "sub": (" - ", 4), "mul": ("·", 5), "div": ("/", 5), "floordiv": ("//", 5), "mod": (" mod ", 5),
    "lt": (" < ", 3), "le": (" ≤ ", 3), "eq": (" = ", 3), "ne": (" ≠ ", 3), "and": (" ∧ ", 2), "or": (" ∨ ", 1), "xor": (" ⊕ ", 1),
}  # fmt: skip


def formula(e: Expr, outer: int = 0) -> str:
    """``e`` in the letters of the site: q·k is the score, T0[b, j] an element of side tensor 0."""
    if isinstance(e, Int):
        return parenthesised(*integer(e.value), outer)
    if isinstance(e, Const):
        return number(e.value)
    if isinstance(e, Score):
        return "q·k" if outer < 5 else "(q·k)"
    if isinstance(e, Load):
        name = f"T{e.slot}" if isinstance(e.slot, int) else str(e.slot)
        return f"{name}[{', '.join(formula(x) for x in e.indices)}]"
    assert isinstance(e, Call)
    if e.op in _INFIX:
        sign, level = _INFIX[e.op]
        inner = [formula(a, level + (k > 0 and e.op in ("sub", "div", "floordiv", "mod"))) for k, a in enumerate(e.args)]
        return parenthesised(sign.join(inner), level, outer)
    if e.op == "not":
        return f"¬{formula(e.args[0], 6)}"
    if e.op == "neg":
        return parenthesised(f"-{formula(e.args[0], 5)}", 4, outer)
    if e.op == "abs":
        return f"|{formula(e.args[0])}|"
    if e.op == "cast":
        return f"{short(e.dtype)}({formula(e.args[0])})"
    if e.op == "where":
        condition, a, b = e.args
        return parenthesised(f"{formula(condition, 1)} ? {formula(a, 1)} : {formula(b, 1)}", 0, outer + 1)
    return f"{e.op}({', '.join(formula(a) for a in e.args)})"


def parenthesised(text: str, level: int, outer: int) -> str:
    return f"({text})" if level < outer else text


def short(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bf16``."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "fp") if "float" in name else name.replace("int", "i")


def number(value: float | bool) -> str:
    """A constant as people write it: -∞, the lowest number of a dtype, or six digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if value == torch.finfo(dtype).min:
            return f"min({short(dtype)})"
    return f"{value:.6g}"


def integer(e: sympy.Expr) -> tuple[str, int]:
    """A sympy integer expression and the precedence of its outermost operation."""
    if e.is_Symbol or (e.is_Integer and e >= 0):
        return str(e), 9
    if e.is_Integer:
        return str(e), 4
    if isinstance(e, FloorDiv | Mod | PythonMod):
        sign = "//" if isinstance(e, FloorDiv) else " mod "
        return sign.join(parenthesised(*integer(a), 6) for a in e.args), 5
    if isinstance(e, Max | Min):
        operands = ", ".join(text for text, _ in map(integer, sorted(e.args, key=str)))
        return f"{'max' if isinstance(e, Max) else 'min'}({operands})", 9
    if e.is_Add:
        terms = sorted(sympy.Add.make_args(e), key=lambda t: (bool(t.could_extract_minus_sign()), bool(t.is_number), str(t)))
        text = parenthesised(*integer(terms[0]), 4)
        for t in terms[1:]:
            minus = bool(t.could_extract_minus_sign())
            text += (" - " if minus else " + ") + parenthesised(*integer(-t if minus else t), 5)
        return text, 4
    if e.is_Mul:
        if e.could_extract_minus_sign():
            return "-" + parenthesised(*integer(-e), 5), 4
        return "·".join(parenthesised(*integer(a), 5) for a in e.args), 5
    return str(e), 9


def mask(site: AttentionSite) -> str:
    """The mask in words where it is proved, as a formula otherwise."""
    facts = site.facts
    if facts.full:
        return "full"
    parts = []
    for low in facts.delta_low:
        offset = -low
        parts.append("causal" if offset == 0 else f"j ≤ {formula(expr.index('i') + Int(offset))}")
    parts += [f"i - j ≤ {parenthesised(*integer(d), 4)}" for d in facts.delta_high]
    parts += [f"j ≤ {integer(x)[0]}" for x in facts.key_high]
    parts += [f"j ≥ {integer(x)[0]}" for x in facts.key_low]
    parts += [formula(term, 2) for term in facts.rest]
    return " ∧ ".join(parts)


def product(band: Band) -> str:
    """A band in the letters of the site: ``q·T0[10 + j - i]``, a vector of each distance from side tensor 0."""
    left = "q" if band.left is None else f"T{band.left}"
    text = f"{left}·T{band.right}[{formula(band.row)}]"
    text = text if band.factor == 1.0 else f"{number(band.factor)}·{text}"
    return text if band.keep == expr.TRUE else f"({formula(band.keep, 1)} ? {text} : 0)"


def line(site: AttentionSite) -> str:
    """The site in one line: ``softmax(0.125·q·k | causal) v  [B=1 H=32/8 M=N=2048 D=128 bf16]``; a sink stands behind the
    mask, ``| causal, sink T0[h])``, and a factor of the probabilities in front, ``T1[h]·softmax(``."""
    shape = f"B={site.batch} H={site.heads}" + (f"/{site.key_heads}" if site.key_heads != site.heads else "")
    lengths = f"M=N={site.queries}" if site.queries == site.keys else f"M={site.queries} N={site.keys}"
    width = f"D={site.head_dim}" + (f"/{site.value_dim}" if site.value_dim != site.head_dim else "")
    fill = "" if site.facts.full or math.isinf(site.fill) else f" else {'+' if site.additive else ''}{number(site.fill)}"
    drop = f", dropout {site.dropout:g}" if site.dropout else ""
    if not site.exponential:
        from attnfx.sites import linear_reference

        return f"{linear_reference.line(site)}  [{shape} {lengths} {width} {short(site.dtype)}]"
    sink = "" if site.sink is None else f", sink {formula(site.sink)}"
    weight = "" if site.weight == expr.ONE else f"{formula(site.weight, 5)}·"
    name = "softmax" if site.normaliser == "softmax" else "exp less max"
    score = formula(site.score) if site.band is None else formula(site.score).replace("q·k", f"q·k + {product(site.band)}")
    skip = "" if site.skip is None else f", tiles below {site.skip} left out"
    order = "" if site.order is None else f", i and j of {site.order}"
    weights = f"{weight}{name}({score} | {mask(site)}{fill}{sink}{skip}{order}{drop})"
    return f"{weights} v  [{shape} {lengths} {width} {short(site.dtype)}]"
