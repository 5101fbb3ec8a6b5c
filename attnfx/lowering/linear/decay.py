"""Static decay: factors of a weight that are a number of the head to the power of the steps from key to query."""

from __future__ import annotations

import math
from collections.abc import Callable

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.expr import INDEX, Call, Const, Expr, Int, Load
from attnfx.site import AttentionSite

I, J, H = INDEX["i"], INDEX["j"], INDEX["h"]
#: The values of a side tensor by its slot, or why they are not known.
Values = Callable[[int], Tensor | str]
_OTHER = "Its weights have a factor of query and key together that is no power of their distance."


class Refusal(Exception):
    """The attention is no linear attention of this kind; the message is the reason, a sentence."""


def rate(site: AttentionSite, e: Expr, values: Values | None) -> Expr:
    """The logarithm, in h, of what ``e`` loses with each step from key to query. Raises Refusal where it does not decay so."""
    if isinstance(e, Call) and e.op in ("exp", "exp2"):
        found = slope(site, e.args[0])
        return found if e.op == "exp" else expr.call("mul", found, Const(math.log(2.0), torch.float64), dtype=torch.float64)
    if isinstance(e, Call) and e.op == "pow" and not _paired(e.args[0]):
        steps, base = slope(site, e.args[1]), numbers(site, e.args[0], values)
        if isinstance(base, str):
            raise Refusal(f"The base of its decay is not known when the graph is compiled: {base}.")
        if not bool((base > 0).all()) or not bool(base.isfinite().all()):
            raise Refusal(f"The base of its decay is {float(base.min()):g}; a state needs a positive one.")
        log = expr.call("log", expr.cast(e.args[0], torch.float64), dtype=torch.float64)
        return expr.call("mul", steps, log, dtype=torch.float64)
    raise Refusal(_OTHER)


def slope(site: AttentionSite, e: Expr) -> Expr:
    """``s(h)`` where ``e`` is ``s(h)`` times the steps from key to query. Raises Refusal where it is not."""
    n = whole(e)
    if n is not None:
        by = n.coeff(I)
        ahead = sympy.expand(site.keys - site.queries)
        if by.is_Integer and by != 0 and sympy.expand(n - by * (I + ahead - J)) == 0:
            return Const(float(by), torch.float64)
    if isinstance(e, Call) and e.op == "cast" and e.dtype.is_floating_point:
        return slope(site, e.args[0])
    if isinstance(e, Call) and e.op == "neg":
        return expr.call("neg", slope(site, e.args[0]), dtype=torch.float64)
    if isinstance(e, Call) and e.op in ("mul", "div"):
        a, b = e.args
        if e.op == "mul" and {I, J} & expr.symbols(b):
            a, b = b, a
        if {I, J} & expr.symbols(a) and not _paired(b):
            return expr.call(e.op, slope(site, a), expr.cast(b, torch.float64), dtype=torch.float64)
    if any(isinstance(n, Load) and {I, J} & expr.symbols(n) for n in expr.walk(e)):
        raise Refusal("Its decay depends on the data of queries and keys; a state is for one number a head.")
    raise Refusal(_OTHER)


def whole(e: Expr) -> sympy.Expr | None:
    """The integer that ``e`` is, in whatever type: float positions are whole numbers, too."""
    if isinstance(e, Int):
        return e.value
    if isinstance(e, Const) and not isinstance(e.value, bool) and float(e.value).is_integer():
        return sympy.Integer(int(e.value))
    if not isinstance(e, Call) or e.op not in ("cast", "add", "sub", "neg"):
        return None
    a, b = whole(e.args[0]), whole(e.args[-1])
    if a is None or b is None:
        return None
    return sympy.expand({"cast": a, "neg": -a, "add": a + b, "sub": a - b}[e.op])


def numbers(site: AttentionSite, e: Expr, values: Values | None) -> Tensor | str:
    """The numbers (H) of a formula of the head where they are known when the graph is compiled, or why they are not."""
    slots = {n.slot for n in expr.walk(e) if isinstance(n, Load) and isinstance(n.slot, int)}
    if expr.symbols(e) - {H} or not site.heads.is_Integer:
        return "it is more than a formula of a known number of heads"
    known: list[Tensor] = [torch.zeros(0)] * len(site.side)
    for slot in slots:
        found = values(slot) if values is not None else "values are not read here"
        if isinstance(found, str):
            return found
        known[slot] = found
    heads = int(site.heads)
    device = next((known[slot].device for slot in slots), torch.device("cpu"))
    return evaluate(e, {"h": torch.arange(heads, device=device)}, known, {}).double().cpu().expand(heads)


def _paired(e: Expr) -> bool:
    return bool({I, J, INDEX["b"]} & expr.symbols(e))
